-- ms, then pairs of (stream's id, key): these streams are still open, whatever the server has forgotten meanwhile.
local ms = tonumber(ARGV[1])
for i = 2, #ARGV, 2 do
  local streams = P .. 'st:' .. ARGV[i + 1]
  redis.call('ZADD', streams, int(now_us() + ms * 1000), ARGV[i])
  keep(streams, ms)
end
return 1
