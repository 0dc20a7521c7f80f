"""The path kernel: per example by the backward sweep, per group by the memory, or at the final weights alone."""
