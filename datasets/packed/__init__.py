"""The packed store, a data set decoded once: `store` reads, `pack` and `store_writer` write it."""
