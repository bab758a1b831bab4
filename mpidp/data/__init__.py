from mpidp.data.dataset import from_dataset as from_dataset
