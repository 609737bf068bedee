from tests.valkey import empty_url, raw, store, valkey  # noqa: F401
