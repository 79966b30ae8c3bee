"""How much of its rate the loader keeps beside a main thread that holds the interpreter lock.

A rank's loader works in a thread of the training process, so everything that it does in Python waits for the lock while
the main thread launches the model. This runs the real `TrainLoader`, over `pipeline sample photos`, beside main threads
that hold the lock for a stated share of the time, and beside the same CPU load without the lock (another process),
which takes away the same core but never the lock. The quotient of the two rates is what the lock alone costs.

Work of the loader, per batch:

  host    everything that the host of a GPU run does in Python: plan, reading, hashes, draws, DALI's external_source,
          RandAugment's rounds, uploads and launches. Pixels are left out: DALI reads the JPEG headers only, and a
          launch is LAUNCH seconds of bytecode. Many batches per second even on a small machine, as on a GPU.
  pixels  the whole loader on CPUs, decoding and augmentation included: few batches per second.

Main threads:

  idle    waits for batches only
  replay  holds the lock 15 % of the time: a training step replayed from CUDA graphs
  python  holds the lock 90 % of the time in bytecode, and releases it for the rest: the worst case of an eager step
  aten    calls small torch operators one after the other: each takes and releases the lock, as an eager step does

The own CPU time of the loader's threads per batch, and how often they had to take the lock back, are counted as well:
unlike rates they hardly depend on what else the machine does.

    python benchmarks/interpreter_lock.py [--rounds 5] [--seconds 3] [--batch 256] [--data DIR] [--out FILE.json]
"""
