#!lua name=LIBRARY

-- Every step that must be atomic. LIBRARY is replaced by a name that holds the hash of this file, so services of
-- different versions use one Redis side by side. All keys of a call share one hash tag.

-- A stream entry's id as a number that a sorted set keeps exactly (below 2^53 until the year 2089).
local SINCE, PER_MS = 1577836800000, 4096

local function to_score(entry)
  local ms, seq = entry:match('^(%d+)-(%d+)$')
  return string.format('%.0f', (tonumber(ms) - SINCE) * PER_MS + math.min(tonumber(seq), PER_MS - 1))
end

local function to_entry(score)
  local n = tonumber(score)
  return string.format('%.0f-%.0f', math.floor(n / PER_MS) + SINCE, n % PER_MS)
end

local function forget(seen, feedback, ids)
  if #ids > 0 then
    redis.call('ZREM', seen, unpack(ids))
    redis.call('HDEL', feedback, unpack(ids))
  end
  return #ids
end

-- keys: outcomes, seen, feedback; args: maxlen, ids remembered, then id, body for each outcome.
local function append(keys, args)
  local added = 0
  for i = 3, #args, 2 do
    if not redis.call('ZSCORE', keys[2], args[i]) then
      local entry = redis.call('XADD', keys[1], 'MAXLEN', '~', args[1], '*', 'id', args[i], 'outcome', args[i + 1])
      redis.call('ZADD', keys[2], to_score(entry), args[i])
      added = added + 1
    end
  end
  local extra = redis.call('ZCARD', keys[2]) - tonumber(args[2])
  if extra > 0 then
    forget(keys[2], keys[3], redis.call('ZRANGE', keys[2], 0, math.min(extra, 1000) - 1))
  end
  return added
end

-- keys: outcomes, seen, feedback; args: maxlen, id, body. 1: the same body was there already.
local function feedback(keys, args)
  local score = redis.call('ZSCORE', keys[2], args[2])
  if not score then
    return redis.error_reply('NOTFOUND no outcome of request ' .. args[2] .. ' is recorded for this task')
  end
  if redis.call('HGET', keys[3], args[2]) == args[3] then
    return 1
  end
  redis.call('HSET', keys[3], args[2], args[3])
  redis.call('XADD', keys[1], 'MAXLEN', '~', args[1], '*',
    'id', args[2], 'feedback', args[3], 'of', to_entry(score))
  return 0
end

-- keys: outcomes, seen; args: id. The stream entry of an outcome, or nothing.
local function find(keys, args)
  local score = redis.call('ZSCORE', keys[2], args[1])
  if not score then return {} end
  local entry = to_entry(score)
  return redis.call('XRANGE', keys[1], entry, entry)
end

-- keys: outcomes, seen, feedback; args: oldest millisecond kept. Entries removed from the stream.
local function trim(keys, args)
  local removed = redis.call('XTRIM', keys[1], 'MINID', '=', args[1] .. '-0')
  local below = '(' .. to_score(args[1] .. '-0')
  repeat
    local n = forget(keys[2], keys[3], redis.call('ZRANGEBYSCORE', keys[2], '-inf', below, 'LIMIT', 0, 1000))
  until n < 1000
  return removed
end

local function read_head(key)
  local h = redis.call('HMGET', key, 'version', 'epoch', 'frozen', 'reason', 'last')
  return {
    version = tonumber(h[1] or 0), epoch = tonumber(h[2] or 0), frozen = h[3] or '0', reason = h[4] or '',
    last = tonumber(h[5] or 0)
  }
end

-- Writes the pointer, the decision record and the notice. d: channel, task, action, parent, actor, reason, keep.
local function decide(keys, h, d)
  h.epoch = h.epoch + 1
  redis.call('HSET', keys[1], 'version', h.version, 'epoch', h.epoch, 'frozen', h.frozen, 'reason', h.reason,
    'last', h.last)
  redis.call('XADD', keys[2], 'MAXLEN', '~', d.keep, '*', 'action', d.action, 'version', h.version,
    'parent', d.parent, 'epoch', h.epoch, 'actor', d.actor, 'reason', d.reason)
  redis.call('PUBLISH', d.channel, cjson.encode({
    kind = 'offset', task = d.task, action = d.action, version = h.version, epoch = h.epoch
  }))
  return {h.version, h.epoch, h.frozen, h.reason}
end

local function moved(h, version, epoch)
  if (version ~= '' and h.version ~= tonumber(version)) or (epoch ~= '' and h.epoch ~= tonumber(epoch)) then
    return redis.error_reply(string.format(
      'CONFLICT the champion is version %d at epoch %d, expected version %s at epoch %s',
      h.version, h.epoch, version ~= '' and version or 'any', epoch ~= '' and epoch or 'any'))
  end
end

-- keys: head, decisions, offsets, lease; args: channel, task, keep, actor, reason, expected version, expected epoch,
-- lease token or '', version, artifact.
local function publish(keys, args)
  local h, token, version = read_head(keys[1]), args[8], tonumber(args[9])
  local conflict = moved(h, args[6], args[7])
  if conflict then return conflict end
  if token ~= '' then
    if redis.call('GET', keys[4]) ~= token then
      return redis.error_reply('CONFLICT the lease with token ' .. token .. ' was lost')
    end
    if h.frozen == '1' then
      return redis.error_reply('CONFLICT the task is frozen: ' .. h.reason)
    end
  end
  if version ~= h.last + 1 or redis.call('HSETNX', keys[3], version, args[10]) == 0 then
    return redis.error_reply(string.format('CONFLICT the next version is %d, not %d', h.last + 1, version))
  end
  redis.call('HSET', keys[1], 'parent:' .. version, h.version)
  local parent = h.version
  h.version, h.last = version, version
  return decide(keys, h, {
    channel = args[1], task = args[2], keep = args[3], action = 'publish', parent = parent, actor = args[4],
    reason = args[5]
  })
end

-- keys: head, decisions, offsets; args: channel, task, keep, actor, reason, expected version, expected epoch,
-- version to return to or '' for the champion's parent.
local function rollback(keys, args)
  local h, to = read_head(keys[1]), tonumber(args[8])
  local conflict = moved(h, args[6], args[7])
  if conflict then return conflict end
  to = to or tonumber(redis.call('HGET', keys[1], 'parent:' .. h.version) or h.version)
  if to == h.version then
    return redis.error_reply(string.format('CONFLICT nothing to roll back: the champion is version %d', to))
  end
  if to ~= 0 and redis.call('HEXISTS', keys[3], to) == 0 then
    return redis.error_reply(string.format('NOTFOUND version %d does not exist', to))
  end
  local parent = h.version
  h.version = to
  return decide(keys, h, {
    channel = args[1], task = args[2], keep = args[3], action = 'rollback', parent = parent, actor = args[4],
    reason = args[5]
  })
end

-- keys: head, decisions; args: channel, task, keep, actor, reason, '1' to freeze or '0'. No change, no record.
local function freeze(keys, args)
  local h = read_head(keys[1])
  if h.frozen == args[6] then
    return {h.version, h.epoch, h.frozen, h.reason}
  end
  h.frozen, h.reason = args[6], args[6] == '1' and args[5] or ''
  return decide(keys, h, {
    channel = args[1], task = args[2], keep = args[3], action = args[6] == '1' and 'freeze' or 'unfreeze',
    parent = h.version, actor = args[4], reason = args[5]
  })
end

-- keys: lease, fence; args: milliseconds. The new token, or 0 while somebody holds the lease.
local function acquire(keys, args)
  if redis.call('EXISTS', keys[1]) == 1 then return 0 end
  local token = redis.call('INCR', keys[2])
  redis.call('SET', keys[1], token, 'PX', args[1])
  return token
end

-- keys: lease; args: token, milliseconds (0 releases). 1: the token still held.
local function renew(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then return 0 end
  redis.call('PEXPIRE', keys[1], args[2])
  return 1
end

-- keys: outcomes, monitor, lease, dead; args: token, lease milliseconds, group, state, dead letters kept, number of
-- dead letters, (entry, reason) for each of them, then the entries to acknowledge. State, acknowledgement and dead
-- letters in one step: a worker killed before it has changed nothing, one killed after it is done.
local function checkpoint(keys, args)
  if redis.call('GET', keys[3]) ~= args[1] then
    return redis.error_reply('CONFLICT the lease with token ' .. args[1] .. ' was lost')
  end
  redis.call('PEXPIRE', keys[3], args[2])
  redis.call('SET', keys[2], args[4])
  local first = 7 + 2 * tonumber(args[6])
  for i = 7, first - 1, 2 do
    local found = redis.call('XRANGE', keys[1], args[i], args[i])
    redis.call('XADD', keys[4], 'MAXLEN', '~', args[5], '*', 'entry', args[i], 'reason', args[i + 1],
      unpack(found[1] and found[1][2] or {}))
  end
  for i = first, #args do
    redis.call('XACK', keys[1], args[3], args[i])
  end
  return #args - first + 1
end

redis.register_function('LIBRARY_append', append)
redis.register_function('LIBRARY_feedback', feedback)
redis.register_function('LIBRARY_find', find)
redis.register_function('LIBRARY_trim', trim)
redis.register_function('LIBRARY_publish', publish)
redis.register_function('LIBRARY_rollback', rollback)
redis.register_function('LIBRARY_freeze', freeze)
redis.register_function('LIBRARY_acquire', acquire)
redis.register_function('LIBRARY_renew', renew)
redis.register_function('LIBRARY_checkpoint', checkpoint)
