-- name, entry → 'ok', or what stands against it: 'missing' (it is not served), 'promoted' (and another version is
-- served), 'last'.
local name, entry = ARGV[1], ARGV[2]
if model_state(name) ~= 'serving' then return 'missing' end
local id, version = string.match(name, '^([^/]*)/(.*)$')
local promoted = redis.call('HGET', P .. 'ma', id) == version
local others = 0
for _, other in ipairs(redis.call('HKEYS', P .. 'm')) do
  if other ~= name and model_state(other) == 'serving' then
    if promoted and string.match(other, '^[^/]*') == id then return 'promoted' end
    others = others + 1
  end
end
if others == 0 then return 'last' end
redis.call('HSET', P .. 'm', name, entry)
if promoted then redis.call('HDEL', P .. 'ma', id) end
return 'ok'
