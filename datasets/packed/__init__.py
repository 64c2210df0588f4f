"""The packed store, a data set decoded once: `store` reads it, `pack`, `store_writer` write it."""
