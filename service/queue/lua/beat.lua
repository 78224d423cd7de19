-- worker, what it says about itself, lease_ms, then pairs of (id, token) that it holds
-- → {{id, 'cancelled' | 'expired' | 'lost'}, …}: the jobs that it need not go on with. The other leases are renewed.
local worker, info, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now, drop = now_us(), {}
local gone_us = int(now + lease_ms * 2000)
redis.call('ZADD', P .. 'wk', gone_us, worker)
redis.call('ZREMRANGEBYSCORE', P .. 'wk', '-inf', '(' .. int(now))
redis.call('PEXPIRE', P .. 'wk', int(lease_ms * 4))
redis.call('SET', P .. 'wi:' .. worker, info, 'PX', int(lease_ms * 2))
for i = 4, #ARGV, 2 do
  local id, token = ARGV[i], ARGV[i + 1]
  if not mine(id, token) then
    drop[#drop + 1] = {id, 'lost'}
  else
    redis.call('ZADD', P .. 'l', int(now + lease_ms * 1000), id)
    local given_up = redis.call('HGET', P .. 'j:' .. id, 'cancel')
    if given_up then drop[#drop + 1] = {id, given_up} end
  end
end
return drop
