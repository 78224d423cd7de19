-- id, token, then pairs of (name, reference): previews of a running job; one of the same name is replaced.
-- → 1, or 0 if it is another worker's by now.
local job = load(ARGV[1])
if not mine(job, ARGV[2]) then return 0 end
local previews = cjson.decode(redis.call('HGET', P .. 'j:' .. job.id, 'previews') or '{}')
for i = 3, #ARGV, 2 do previews[ARGV[i]] = ARGV[i + 1] end
set(job.id, 'previews', cjson.encode(previews))
tell_watchers(job)
return 1
