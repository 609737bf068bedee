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

local HEAD = {'version', 'epoch', 'frozen', 'reason', 'challenger', 'share', 'pinned', 'last'}

local function read_head(key)
  local h = redis.call('HMGET', key, unpack(HEAD))
  return {
    version = tonumber(h[1] or 0), epoch = tonumber(h[2] or 0), frozen = h[3] or '0', reason = h[4] or '',
    challenger = tonumber(h[5] or 0), share = h[6] or '0', pinned = h[7] or '0', last = tonumber(h[8] or 0)
  }
end

local function as_reply(h)
  return {h.version, h.epoch, h.frozen, h.reason, h.challenger, h.share, h.pinned}
end

local function conflict(text, ...)
  return redis.error_reply('CONFLICT ' .. string.format(text, ...))
end

-- Every decision has the same keys: head, decisions, offsets, lease, round; and the same first arguments: channel,
-- task, keep, actor, reason, evidence, expected version, expected epoch, lease token, cursor, gate state ('' is none).
-- What is particular to one follows from the twelfth argument on.

-- The head, or why the step is refused. `stops`: by what an automatic step, one with a token, is refused.
local function begin(keys, args, stops)
  local h, version, epoch, token = read_head(keys[1]), args[7], args[8], args[9]
  if (version ~= '' and h.version ~= tonumber(version)) or (epoch ~= '' and h.epoch ~= tonumber(epoch)) then
    return nil, conflict('the champion is version %d at epoch %d, expected version %s at epoch %s', h.version, h.epoch,
      version ~= '' and version or 'any', epoch ~= '' and epoch or 'any')
  end
  if token ~= '' then
    if redis.call('GET', keys[4]) ~= token then
      return nil, conflict('the lease with token %s was lost', token)
    end
    if h.frozen == '1' and stops.frozen then
      return nil, conflict('the task is frozen: %s', h.reason)
    end
    if h.pinned == '1' and stops.pinned then
      return nil, conflict('the task is pinned to version %d', h.version)
    end
  end
  return h
end

-- Writes the pointer, the decision record, the round's state and the notice. `parent`: the champion before the step;
-- `challenger`: the one that the step was about or put an end to.
local function decide(keys, args, h, action, parent, challenger)
  h.epoch = h.epoch + 1
  local values = {}
  for _, name in ipairs(HEAD) do
    values[#values + 1] = name
    values[#values + 1] = h[name]
  end
  redis.call('HSET', keys[1], unpack(values))
  redis.call('XADD', keys[2], 'MAXLEN', '~', args[3], '*', 'action', action, 'version', h.version, 'parent', parent,
    'epoch', h.epoch, 'challenger', challenger, 'share', h.share, 'actor', args[4], 'reason', args[5],
    'evidence', args[6])
  if args[9] ~= '' and args[10] ~= '' then
    redis.call('HSET', keys[5], 'cursor', args[10], 'gate', args[11])
  end
  redis.call('PUBLISH', args[1], cjson.encode({
    kind = 'offset', task = args[2], action = action, version = h.version, epoch = h.epoch, challenger = h.challenger,
    share = tonumber(h.share)
  }))
  return as_reply(h)
end

-- Makes `version` the champion. A running challenger was measured against another one, so it ends.
local function crown(keys, args, h, action, version)
  local parent, challenger = h.version, h.challenger
  h.version, h.challenger, h.share = version, 0, '0'
  return decide(keys, args, h, action, parent, challenger)
end

-- Keeps an artifact as the next version, a child of the champion; nothing, or why it is refused.
local function keep(keys, h, version, artifact)
  if version ~= h.last + 1 or redis.call('HSETNX', keys[3], version, artifact) == 0 then
    return conflict('the next version is %d, not %d', h.last + 1, version)
  end
  redis.call('HSET', keys[1], 'parent:' .. version, h.version)
  h.last = version
end

local function missing(keys, version)
  if version ~= 0 and redis.call('HEXISTS', keys[3], version) == 0 then
    return redis.error_reply(string.format('NOTFOUND version %d does not exist', version))
  end
end

local BOTH, PINNED, NONE = {frozen = true, pinned = true}, {pinned = true}, {}

-- version, artifact: the new champion.
local function publish(keys, args)
  local h, refused = begin(keys, args, BOTH)
  refused = refused or keep(keys, h, tonumber(args[12]), args[13])
  return refused or crown(keys, args, h, 'publish', h.last)
end

-- version, artifact, share: the new challenger; the champion stays.
local function propose(keys, args)
  local h, refused = begin(keys, args, BOTH)
  if h and h.challenger ~= 0 then
    return conflict('version %d is the challenger; promote or withdraw it first', h.challenger)
  end
  refused = refused or keep(keys, h, tonumber(args[12]), args[13])
  if refused then return refused end
  h.challenger, h.share = h.last, args[14]
  return decide(keys, args, h, 'propose', h.version, h.challenger)
end

-- share: the challenger's, larger than it is.
local function advance(keys, args)
  local h, refused = begin(keys, args, BOTH)
  if refused then return refused end
  if h.challenger == 0 then return conflict('there is no challenger') end
  if tonumber(args[12]) <= tonumber(h.share) then
    return conflict('the challenger has a share of %s already, and %s is not more', h.share, args[12])
  end
  h.share = args[12]
  return decide(keys, args, h, 'advance', h.version, h.challenger)
end

local function promote(keys, args)
  local h, refused = begin(keys, args, BOTH)
  if refused then return refused end
  if h.challenger == 0 then return conflict('there is no challenger') end
  return crown(keys, args, h, 'promote', h.challenger)
end

local function withdraw(keys, args)
  local h, refused = begin(keys, args, NONE)
  if refused then return refused end
  if h.challenger == 0 then return conflict('there is no challenger') end
  return crown(keys, args, h, 'withdraw', h.version)
end

-- version to return to, or '' for the champion's parent.
local function rollback(keys, args)
  local h, refused = begin(keys, args, PINNED)
  if refused then return refused end
  local to = tonumber(args[12]) or tonumber(redis.call('HGET', keys[1], 'parent:' .. h.version) or h.version)
  if to == h.version then
    return conflict('nothing to roll back: the champion is version %d', to)
  end
  return missing(keys, to) or crown(keys, args, h, 'rollback', to)
end

-- version to pin, or '' for the champion. Pinned to it already is no change and no record.
local function pin(keys, args)
  local h, refused = begin(keys, args, NONE)
  if refused then return refused end
  local to = tonumber(args[12]) or h.version
  if h.pinned == '1' and h.version == to and h.challenger == 0 then
    return as_reply(h)
  end
  refused = missing(keys, to)
  if refused then return refused end
  h.pinned = '1'
  return crown(keys, args, h, 'pin', to)
end

-- flag ('frozen' or 'pinned'), '1' or '0', action. No change, no record.
local function flag(keys, args)
  local h, refused = begin(keys, args, NONE)
  if refused then return refused end
  if h[args[12]] == args[13] then
    return as_reply(h)
  end
  h[args[12]] = args[13]
  if args[12] == 'frozen' then
    h.reason = args[13] == '1' and args[5] or ''
  end
  return decide(keys, args, h, args[14], h.version, h.challenger)
end

-- keys: round, lease; args: token, cursor, gate state.
local function save_round(keys, args)
  if redis.call('GET', keys[2]) ~= args[1] then
    return conflict('the lease with token %s was lost', args[1])
  end
  redis.call('HSET', keys[1], 'cursor', args[2], 'gate', args[3])
  return 1
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
redis.register_function('LIBRARY_propose', propose)
redis.register_function('LIBRARY_advance', advance)
redis.register_function('LIBRARY_promote', promote)
redis.register_function('LIBRARY_withdraw', withdraw)
redis.register_function('LIBRARY_pin', pin)
redis.register_function('LIBRARY_flag', flag)
redis.register_function('LIBRARY_save_round', save_round)
redis.register_function('LIBRARY_acquire', acquire)
redis.register_function('LIBRARY_renew', renew)
redis.register_function('LIBRARY_checkpoint', checkpoint)
