// Linked in front of the kernels and behind them, with another name: what lies between is their
// static shared memory, since a linker keeps thread-local variables in the order of its files.
__thread char SHARED_MARK[16];
