"""Pretrain Llama 3 and let the measured gradient noise scale choose the batch size."""

import os

# Before torch is imported: threads that wait for one another then sleep instead of spinning. On two
# cores with one other busy process a step took half the time; on a quiet machine it makes no
# difference that could be measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
