-- stream's id, key, the most that the key may have open, ms → 1 if it counts as open for so long, 0 if there are too many
local id, streams, most, ms = ARGV[1], P .. 'st:' .. ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', streams, '-inf', int(now_us()))
if not redis.call('ZSCORE', streams, id) and redis.call('ZCARD', streams) >= most then return 0 end
redis.call('ZADD', streams, int(now_us() + ms * 1000), id)
keep(streams, ms)
return 1
