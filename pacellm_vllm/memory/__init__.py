"""Where a request's bank lives: pages of vLLM's own paged KV cache pool.

``layout``   BankLayout, which row of a bank lies in which page, and how many pages tokens need
``places``   Places, where in its pages each row of a bank lies
``store``    PagedStore, one bank read and written where it lies in a request's pages
``snapshots`` SnapshotGrid, where banks are copied for the prefix cache, and into which pages
``cache``    SnapshotCache, banks among the cached blocks of vLLM's pool
``spec``     PagedBankSpec, what the scheduler knows of a bank
``manager``  PagedBankManager, which claims, shares and frees banks' pages
``drafts``   what speculative decoding asks of a bank
``plan``     how large pages are in a given engine, and what it cannot share blocks with
``batch``    BatchSettings, what the requests of a worker's batch have set for themselves
``pieces``   Piece, tokens of one request in one segment, which a batch is cut into
``plain``    PlainStep, what the plain PyTorch ops do in one step
``device``   DeviceStep, what the kernels do in one step, and its tables on the device
``backend``  the metadata that a step's memory layers share
``layer``    PaceMemory, the vLLM layer of one FFN, and its custom op
``stage``    StageWithoutMemory, what a pipeline stage has that has no memory layer
``counts``   what the memory did so far, since the engine started
``journal``  what it did for each request that asked to be told
"""
