-- id, api: from now on, tell this API process what happens to the job.
if redis.call('EXISTS', P .. 'j:' .. ARGV[1]) == 1 then watch(ARGV[1], ARGV[2]) end
return 1
