-- id, 'cancelled' | 'expired' → 'missing', or the job's state after the call. A waiting job ends at once; a running one
-- is marked (and stays 'running' until its worker notices); a finished one stays as it is.
return give_up(ARGV[1], ARGV[2])
