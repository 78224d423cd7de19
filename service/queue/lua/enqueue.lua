-- id, lane, shape, images, payload, reply, timeout_ms, ttl_ms, max_pending, key
-- → {'ok' | 'known' | 'full', waiting}. Repeating it changes nothing: the id is chosen by the caller.
local id, lane, shape, images, payload, reply = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local timeout_ms, ttl_ms, max_pending = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local key = P .. 'j:' .. id
local waiting = redis.call('ZCARD', P .. 'pending')
if redis.call('EXISTS', key) == 1 then return {'known', waiting} end
if waiting >= max_pending then return {'full', waiting} end
local now = now_us()
redis.call('HSET', key, 'lane', lane, 'images', images, 'payload', payload, 'reply', reply, 'score', int(now),
  'created_us', int(now), 'deadline_us', int(now + timeout_ms * 1000), 'ttl_ms', int(ttl_ms), 'attempts', 0, 'key', ARGV[10])
redis.call('PEXPIRE', key, int(timeout_ms + ttl_ms))
push(id, lane .. '|' .. shape, int(now), timeout_ms + ttl_ms)
wake(lane)
return {'ok', waiting + 1}
