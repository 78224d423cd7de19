-- id, version → 'ok', or 'missing' if it is not served.
if model_state(ARGV[1] .. '/' .. ARGV[2]) ~= 'serving' then return 'missing' end
redis.call('HSET', P .. 'ma', ARGV[1], ARGV[2])
return 'ok'
