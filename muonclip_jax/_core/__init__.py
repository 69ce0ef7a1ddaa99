"""What everything else stands on: paths, meshes, shardings, dtypes, sowing."""
