import pytest
from small_classifier import draw_images, encode, pack


@pytest.fixture(scope='session')
def packed(tmp_path_factory):
    """A folder with train.npz (48 images) and val.npz (12)."""
    folder = tmp_path_factory.mktemp('packed')
    for seed, (split, count) in enumerate((('train', 48), ('val', 12))):
        pack(folder / f'{split}.npz',
             [encode(image) for image in draw_images(count, seed)],
             [i % 3 for i in range(count)])
    return folder
