-- lane → 1 if no job of it waits or runs.
for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
  if lane_of(bucket) == ARGV[1] then return 0 end
end
for _, id in ipairs(redis.call('ZRANGE', P .. 'l', 0, -1)) do
  if redis.call('HGET', P .. 'j:' .. id, 'lane') == ARGV[1] then return 0 end
end
return 1
