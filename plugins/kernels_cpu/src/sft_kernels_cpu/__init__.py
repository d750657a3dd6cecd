"""Native code for sft on CPUs: what plugin ``fast-cpu`` computes with."""
