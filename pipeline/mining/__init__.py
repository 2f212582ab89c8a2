"""Mining over the whole training set: embedding table, neighbour index, memory dictionary, in a server that workers ask."""
