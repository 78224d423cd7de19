-- id: its record is removed before its time, and it is listed no more → 'missing' or 'erased'; or, unchanged, its state
-- if it has not ended, or its scores are still to come. Whatever refers to it finds it gone, as if it had expired; a
-- webhook that is still to be sent is not.
local job = load(ARGV[1])
if not job.state then return 'missing' end
local ended = job.state ~= 'queued' and job.state ~= 'running'
if not ended or job.scoring == 'pending' then return job.state end
for _, name in ipairs({'dead', 'wh', 'k:' .. (job.key or '')}) do redis.call('ZREM', P .. name, job.id) end
redis.call('DEL', P .. 'j:' .. job.id)
return 'erased'
