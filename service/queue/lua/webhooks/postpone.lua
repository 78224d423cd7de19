-- id, delay_ms: its webhook is tried again after that.
return redis.call('ZADD', P .. 'wh', 'XX', int(now_us() + tonumber(ARGV[2]) * 1000), ARGV[1])
