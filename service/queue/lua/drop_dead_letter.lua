-- id: a dead letter that has been dealt with; its record is kept as long as any other from now on.
-- → 1, or 0 if there is no such letter.
local found = redis.call('ZREM', P .. 'dead', ARGV[1])
local key = P .. 'j:' .. ARGV[1]
local ttl_ms = redis.call('HGET', key, 'ttl_ms')
if found == 1 and ttl_ms then redis.call('PEXPIRE', key, ttl_ms) end
return found
