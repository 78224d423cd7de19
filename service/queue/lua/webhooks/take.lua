-- limit, lease_ms → {{id, try, what was asked for}, …}: webhooks (zset wh, by the moment of the next try; close() puts
-- them there) whose time has come. They are tried again after the lease unless they are completed. Of a job whose record
-- is gone nothing can be sent: it is returned once, without a request.
local due_now = {}
for _, id in ipairs(due('wh', tonumber(ARGV[1]))) do
  local asked = redis.call('HGET', P .. 'j:' .. id, 'webhook')
  if asked then
    redis.call('ZADD', P .. 'wh', int(now_us() + tonumber(ARGV[2]) * 1000), id)
    due_now[#due_now + 1] = {id, redis.call('HINCRBY', P .. 'j:' .. id, 'webhook_tries', 1), asked}
  else
    redis.call('ZREM', P .. 'wh', id)
    due_now[#due_now + 1] = {id, 0, ''}
  end
end
return due_now
