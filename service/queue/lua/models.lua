-- What is to become of each model, where models come and go: hash m holds JSON of {state, attempt, reason} by <id>/<version>,
-- hash ma the promoted version by id. Neither runs out: it is what an operator decided. The first argument says what to do:
-- 'read' → {m, ma}, each a list of names and values.
-- 'init', JSON of {name: entry}, JSON of {id: version}: what was not said before counts as said.
-- 'turn', name, 'state state …' (none: nothing was said), entry: from one of these states → 1, else 0.
-- 'unload', name, entry → 'ok', or what stands against it: 'missing', 'promoted' (and another version is served), 'last'.
-- 'promote', id, version → 'ok', or 'missing' if it is not served. 'settle' does it only if nothing was promoted yet.
-- 'idle', lane → 1 if no job of the lane waits or runs.
local what = ARGV[1]

local function state_of(name)
  local entry = redis.call('HGET', P .. 'm', name)
  return entry and cjson.decode(entry).state or 'none'
end

if what == 'read' then
  return {redis.call('HGETALL', P .. 'm'), redis.call('HGETALL', P .. 'ma')}
elseif what == 'init' then
  for name, entry in pairs(cjson.decode(ARGV[2])) do redis.call('HSETNX', P .. 'm', name, cjson.encode(entry)) end
  for id, version in pairs(cjson.decode(ARGV[3])) do redis.call('HSETNX', P .. 'ma', id, version) end
  return 1
elseif what == 'turn' then
  local state = state_of(ARGV[2])
  for from in string.gmatch(ARGV[3], '%S+') do
    if from == state then
      redis.call('HSET', P .. 'm', ARGV[2], ARGV[4])
      return 1
    end
  end
  return 0
elseif what == 'unload' then
  if state_of(ARGV[2]) ~= 'serving' then return 'missing' end
  local id, version = string.match(ARGV[2], '^([^/]*)/(.*)$')
  local promoted = redis.call('HGET', P .. 'ma', id) == version
  local others = 0
  for _, name in ipairs(redis.call('HKEYS', P .. 'm')) do
    if name ~= ARGV[2] and state_of(name) == 'serving' then
      if promoted and string.match(name, '^[^/]*') == id then return 'promoted' end
      others = others + 1
    end
  end
  if others == 0 then return 'last' end
  redis.call('HSET', P .. 'm', ARGV[2], ARGV[3])
  if promoted then redis.call('HDEL', P .. 'ma', id) end
  return 'ok'
elseif what == 'promote' or what == 'settle' then
  if state_of(ARGV[2] .. '/' .. ARGV[3]) ~= 'serving' then return 'missing' end
  if what == 'promote' then
    redis.call('HSET', P .. 'ma', ARGV[2], ARGV[3])
  else
    redis.call('HSETNX', P .. 'ma', ARGV[2], ARGV[3])
  end
  return 'ok'
end

for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
  if lane_of(bucket) == ARGV[2] then return 0 end
end
for _, id in ipairs(redis.call('ZRANGE', P .. 'l', 0, -1)) do
  if redis.call('HGET', P .. 'j:' .. id, 'lane') == ARGV[2] then return 0 end
end
return 1
