-- id, cost → {the share of the workers' time that first rounds take and that it takes to work off what waits, in
-- millionths; 1 if a further round of the job at that cost would end after its deadline, else 0}. It would wait at its
-- old place.
local job = load(ARGV[1])
local waiting = redis.call('ZCARD', P .. 'pending')
local share = utilisation() + drain_ms(waiting, waiting) * 1000 / ARRIVALS_US
if not job.state then return {int(share * 1e6), 1} end
local wait_ms = drain_ms(math.min(waiting, ahead_of(job.score)), waiting)
local own_ms = ARGV[2] * (pace_of(redis.call('HGET', P .. 'rt', job.lane)) or 0) / 1000
local left_ms = (tonumber(job.deadline_us) - now_us()) / 1000
return {int(share * 1e6), wait_ms + own_ms > left_ms and 1 or 0}
