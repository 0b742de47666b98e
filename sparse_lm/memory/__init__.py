"""Hash-lookup memory: n-grams of tokens address rows of large tables, which cost bytes and no products."""
