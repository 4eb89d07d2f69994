//! Values that are found by a number which stays the same while they are there.

/// Grows to the most values that were there at once, and then allocates nothing.
pub(super) struct Slab<T> {
    values: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { values: vec![], free: vec![] }
    }
}

impl<T> Slab<T> {
    /// The key that the next value will get.
    pub(super) fn next_key(&self) -> usize {
        self.free.last().copied().unwrap_or(self.values.len())
    }

    /// Takes a value in; its key may have belonged to one that was removed.
    pub(super) fn insert(&mut self, value: T) -> usize {
        match self.free.pop() {
            Some(key) => {
                self.values[key] = Some(value);
                key
            }
            None => {
                self.values.push(Some(value));
                self.values.len() - 1
            }
        }
    }

    pub(super) fn get(&self, key: usize) -> Option<&T> {
        self.values.get(key)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, key: usize) -> Option<&mut T> {
        self.values.get_mut(key)?.as_mut()
    }

    pub(super) fn remove(&mut self, key: usize) -> Option<T> {
        let value = self.values.get_mut(key)?.take();
        if value.is_some() {
            self.free.push(key);
        }
        value
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.values.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.values.iter().flatten()
    }
}
