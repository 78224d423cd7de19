-- Deliveries that are owed (zset wh, by the moment of the next try); close() puts them there.
-- 'take', limit, lease_ms → {{id, try, what was asked for}, …}: those whose time has come; they are tried again after the
-- lease unless they are settled. A job that is kept no longer is not told of.
-- 'settle', id: delivered or given up. 'postpone', id, delay_ms.
local what = ARGV[1]
if what == 'settle' then return redis.call('ZREM', P .. 'wh', ARGV[2]) end
if what == 'postpone' then
  return redis.call('ZADD', P .. 'wh', 'XX', int(now_us() + tonumber(ARGV[3]) * 1000), ARGV[2])
end
local owed = {}
for _, id in ipairs(due('wh', tonumber(ARGV[2]))) do
  local asked = redis.call('HGET', P .. 'j:' .. id, 'webhook')
  if asked then
    redis.call('ZADD', P .. 'wh', int(now_us() + tonumber(ARGV[3]) * 1000), id)
    owed[#owed + 1] = {id, redis.call('HINCRBY', P .. 'j:' .. id, 'webhook_tries', 1), asked}
  else
    redis.call('ZREM', P .. 'wh', id)
  end
end
return owed
