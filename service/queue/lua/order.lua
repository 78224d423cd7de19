-- worker, what an operator wants of it: 'paused', 'draining', or '' (as usual)
-- → 'missing' if it has given no sign of life lately, else what is wanted of it now: who drains does so for good.
local worker, wanted = ARGV[1], ARGV[2]
if tonumber(redis.call('ZSCORE', P .. 'wk', worker) or 0) < now_us() then return 'missing' end
local key = P .. 'wo:' .. worker
if redis.call('GET', key) == 'draining' then return 'draining' end
if wanted == '' then
  redis.call('DEL', key)
else
  redis.call('SET', key, wanted, 'PX', WEEK_MS)
end
return wanted
