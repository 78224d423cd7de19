-- → {entries, promoted, canaries}, each a list of names and values: hash m holds JSON of {state, attempt, reason} by
-- <id>/<version>, hash ma the promoted version by id, hash ca JSON of the canary by id. None expires: it is what an
-- operator decided.
return {redis.call('HGETALL', P .. 'm'), redis.call('HGETALL', P .. 'ma'), redis.call('HGETALL', P .. 'ca')}
