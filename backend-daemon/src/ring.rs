//! A virtqueue as a device sees it: take chains, give them back, and nothing else.
