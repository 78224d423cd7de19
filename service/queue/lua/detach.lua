-- id, client: a client on an open connection stops waiting, and will ask for the job later: it is not given up any more
-- when clients disconnect.
-- → 'missing', or the job's state.
local id, client = ARGV[1], ARGV[2]
redis.call('SREM', P .. 'a:' .. id, client)
local job = load(id)
if not job.state then return 'missing' end
set(id, 'detached', 1)
return job.state
