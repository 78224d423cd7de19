-- id, delay_ms, untried: its webhook is tried again after that. untried: 1 if it was taken and not tried.
local key = P .. 'j:' .. ARGV[1]
if ARGV[3] == '1' and redis.call('EXISTS', key) == 1 then redis.call('HINCRBY', key, 'webhook_tries', -1) end
return redis.call('ZADD', P .. 'wh', 'XX', int(now_us() + tonumber(ARGV[2]) * 1000), ARGV[1])
