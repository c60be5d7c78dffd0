"""A wall clock that is wrong by $SKEW_S seconds, for every Python that has this folder on PYTHONPATH."""

import os
import time

SKEW_S = float(os.environ["SKEW_S"])


def skewed(call, unit):
    return lambda: call() + type(call())(SKEW_S * unit)


def skewed_clock(call, unit):
    def read(clock):
        return call(clock) + type(call(clock))(SKEW_S * unit) if clock == time.CLOCK_REALTIME else call(clock)

    return read


time.time, time.time_ns = skewed(time.time, 1), skewed(time.time_ns, 10**9)
time.clock_gettime = skewed_clock(time.clock_gettime, 1)
time.clock_gettime_ns = skewed_clock(time.clock_gettime_ns, 10**9)
