"""Define the flag that pysc2 would define, and parse absl flags as a side effect of the import."""

from absl import flags

if "sc2_timeout" not in flags.FLAGS:  # a test may have purged sys.modules and imported again
    flags.DEFINE_integer("sc2_timeout", 360, "Seconds to wait for an answer of the game.")
flags.FLAGS(["stand-in"])
