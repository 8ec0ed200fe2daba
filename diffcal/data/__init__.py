"""Images, soft labels and the data sets built from them."""
