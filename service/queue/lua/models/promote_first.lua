-- id, version → 'ok', or 'missing' if it is not served. A version that was promoted before stays so.
if model_state(ARGV[1] .. '/' .. ARGV[2]) ~= 'serving' then return 'missing' end
redis.call('HSETNX', P .. 'ma', ARGV[1], ARGV[2])
return 'ok'
