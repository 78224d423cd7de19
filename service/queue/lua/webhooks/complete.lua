-- id: its webhook was delivered or given up → 1, or 0 if there was none.
return redis.call('ZREM', P .. 'wh', ARGV[1])
