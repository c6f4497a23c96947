"""Pipeline parallelism: which layers a stage holds, the stage itself, and the order of the micro-batches."""
