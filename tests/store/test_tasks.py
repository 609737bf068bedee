from __future__ import annotations

from service.store.client import Store


async def test_register_list_delete(store: Store) -> None:
    assert await store.tasks.list() == (0, {})
    assert await store.tasks.revision() == 0
    assert await store.tasks.register("riddle", {"id": "riddle", "examples": ["ä"]}) == 1
    assert await store.tasks.register("quiz", {"id": "quiz"}) == 2
    assert await store.tasks.list() == (2, {"quiz": {"id": "quiz"}, "riddle": {"id": "riddle", "examples": ["ä"]}})
    assert await store.tasks.delete("riddle")
    assert not await store.tasks.delete("riddle")
    revision, tasks = await store.tasks.list()
    assert revision > 2
    assert list(tasks) == ["quiz"]


async def test_registering_again_replaces(store: Store) -> None:
    await store.tasks.register("quiz", {"a": 1})
    assert await store.tasks.register("quiz", {"b": 2}) == 2
    assert (await store.tasks.list())[1] == {"quiz": {"b": 2}}
