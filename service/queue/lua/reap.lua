-- max attempts → the number of jobs whose lease had run out.
return reap(1000, tonumber(ARGV[1]))
