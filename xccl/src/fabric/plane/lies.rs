//! A network card that says anything, and records that were made up.

use std::os::fd::BorrowedFd;

use super::*;
use crate::lies::Garbage;

/// Takes all that is put, and has happened what it is told.
struct Card {
    regions: usize,
    happens: Arc<Mutex<Vec<Event>>>,
    is_full: bool,
}

impl Endpoint for Card {
    fn address(&self) -> Result<Vec<u8>> {
        Ok(vec![])
    }

    fn connect(&mut self, _addresses: &[Option<Vec<u8>>]) -> Result<()> {
        Ok(())
    }

    fn register(&mut self, _memory: &Arc<Mapping>, range: Range<usize>, _access: Access) -> Result<Region> {
        self.regions += 1;
        let remote = RemoteRegion { base: 0, key: self.regions as u64, bytes: range.len() as u64 };
        Ok(Region { index: self.regions, remote })
    }

    fn put(
        &mut self,
        _to: usize,
        (from, range): (Region, Range<usize>),
        (into, offset): (RemoteRegion, usize),
        _immediate: u32,
        _token: Option<u64>,
    ) -> Result<Posted> {
        assert!(
            range.end as u64 <= from.remote.bytes && (offset + range.len()) as u64 <= into.bytes,
            "beyond a region"
        );
        Ok(if self.is_full { Posted::Full } else { Posted::Yes })
    }

    fn most_parts(&self) -> usize {
        MOST_PARTS
    }

    fn put_parts(&mut self, to: usize, parts: &[Part], immediate: u32) -> Result<Posted> {
        for part in parts {
            if self.put(to, part.from.clone(), part.into, immediate, None)? == Posted::Full {
                return Ok(Posted::Full);
            }
        }
        Ok(Posted::Yes)
    }

    fn get(
        &mut self,
        _of: usize,
        _from: (RemoteRegion, usize),
        _into: (Region, Range<usize>),
        _token: u64,
    ) -> Result<Posted> {
        Ok(Posted::Yes)
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> Result<()> {
        events.append(&mut lock(&self.happens));
        Ok(())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn may_sleep(&mut self) -> bool {
        true
    }
}

/// Arrivals and records of a rank that lies.
pub(crate) fn records(g: &mut Garbage<'_>) {
    let happens = Arc::new(Mutex::new(vec![]));
    let card = Card { regions: 0, happens: happens.clone(), is_full: g.one_in(8) };
    let Ok(plane) = Plane::new(Box::new(card), 0, &[false, true, true]) else { return };
    let Ok(memory) = Mapping::anonymous(8192).map(Arc::new) else { return };
    let window = Window { memory: memory.clone(), base: 4096, range: 64..2048 };
    plane.add_window(vec![None, Some(window.clone()), Some(window)]);
    for rank in [1, 2] {
        plane.set_records(rank, RemoteRegion { base: 0, key: 0, bytes: RING as u64 });
    }
    let landing = lock(&plane.state).peers[1].as_ref().map(|peer| peer.landing.0.clone());
    let Some(landing) = landing else { return };
    let mut number = 0;
    for _ in 0..g.below(40) {
        match g.byte() % 8 {
            // A record that could be, but for some of its words.
            0..5 => {
                number += 1;
                let mut record = Record::new(if g.one_in(12) { g.word() } else { number });
                for _ in 0..g.below(4) {
                    record.push(&update(g));
                }
                let puts = if g.one_in(8) { g.word() as u32 } else { 0 };
                let bytes = record.finish(puts, if g.one_in(8) { g.word() } else { 0 });
                let slot = (number % RECORDS) as usize * RECORD_BYTES;
                landing.write(slot, bytes);
                g.scatter(&landing, slot..slot + 64, 2);
                lock(&happens).push(Event::Arrived { immediate: immediate(RECORD, 1, number) });
            }
            5 => lock(&happens).push(Event::Arrived { immediate: g.word() as u32 }),
            6 => {
                let token = plane.fetch(1, 0, 64, Change::Nothing);
                let _ = plane.answer(token);
            }
            _ => plane.send(1 + g.below(2), [], &[update(g)]),
        }
        plane.progress(|_| {});
        let _ = (plane.is_settled(1), plane.describe(1), plane.trouble(|_| true));
    }
    // What is outside of the window is what it was.
    let mut outside = [0u8; 4096 + 64];
    memory.read(0, &mut outside);
    assert!(outside.iter().all(|&byte| byte == 0), "a word outside of the window has changed");
}

fn update(g: &mut Garbage<'_>) -> Update {
    let window = if g.one_in(8) { g.word() as u16 } else { 0 };
    let offset = if g.one_in(2) { g.word() as usize } else { 64 + g.below(300) * 8 };
    let value = g.word();
    match g.byte() % 7 {
        0 => Update::Word64 { window, offset, value },
        1 => Update::Word32 { window, offset, value: value as u32 },
        2 => Update::Line { window, offset, words: [value; 8] },
        3 => Update::Bytes { window, offset, len: g.below(MOST_BYTES + 1), words: [value; MOST_BYTES / 8] },
        4 => Update::Add { window, offset, value },
        5 => Update::Fetch { window, offset, change: Change::Add(value), token: g.word() },
        _ => Update::Answer { token: g.word(), value },
    }
}
