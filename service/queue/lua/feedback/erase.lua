-- key ('': all keys): erase the prompts that were kept of it, and what its clients have said of images. What it has asked
-- for before this moment leaves none any more; that is remembered for as long as such a job may last.
-- → how many prompts were erased.
local ERASED_MS = 8 * 86400000
local key, erased = ARGV[1], 0
for _, field in ipairs(redis.call('ZRANGE', P .. 'fz', 0, -1)) do
  if key == '' or string.match(field, '^(.*)|[^|]*$') == key then
    drop_prompt(field)
    erased = erased + 1
  end
end
if key == '' then redis.call('DEL', P .. 'fb', P .. 'fz', P .. 'fc') else redis.call('HDEL', P .. 'fc', key) end
if key ~= '' then
  for _, id in ipairs(redis.call('ZRANGE', P .. 'k:' .. key, 0, -1)) do redis.call('HDEL', P .. 'j:' .. id, 'feedback') end
end
redis.call('HSET', P .. 'fe', key, int(now_us()))
redis.call('PEXPIRE', P .. 'fe', int(ERASED_MS))
return erased
