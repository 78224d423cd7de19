-- id, api: from now on, tell this API process what happens to the job.
local job = load(ARGV[1])
if job.state then watch(job, ARGV[2]) end
return 1
