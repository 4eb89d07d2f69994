//! Messages, and the communicators that carry them.

use anyhow::{Result, ensure};
use xccl::{Communicator, Error, Source, wait_all};

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + salt * 13 + (i >> 8)) as u8).collect()
}

pub(crate) fn messages(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    // Around every limit, both neighbours at once, private memory and heap.
    for len in
        [0, 1, 8, 39, 40, 41, 63, 64, 65, 4095, 4096, 4097, 32767, 32768, 65536, 65537, 131071, 131072, 131073, 1 << 20]
    {
        let mut heap = comm.heap_alloc(len.max(1))?;
        heap[..len].copy_from_slice(&pattern(len, rank));
        let private = pattern(len, rank);
        let (mut a, mut b) = (vec![0; len], vec![0; len]);
        comm.scope(|s| {
            let requests = [
                s.irecv(left, 1, &mut a)?,
                s.irecv(left, 2, &mut b)?,
                s.isend(right, 1, &heap[..len])?,
                s.isend(right, 2, &private)?,
            ];
            wait_all(requests)
        })?;
        ensure!(a == pattern(len, left) && b == pattern(len, left), "{len} bytes from rank {left} differ");
    }
    // Many outstanding, received in another order of tags, in order within a tag.
    let texts: Vec<Vec<u8>> = (0..200).map(|i| pattern(i % 50, i)).collect();
    comm.scope(|s| {
        let sends = texts
            .iter()
            .enumerate()
            .map(|(i, t)| s.isend(right, 10 + (i % 3) as u32, t))
            .collect::<xccl::Result<Vec<_>>>()?;
        for tag in [2, 0, 1] {
            for i in (0..200).filter(|i| i % 3 == tag) {
                let mut buffer = [0; 64];
                let status = comm.recv(left, 10 + tag as u32, &mut buffer)?;
                assert_eq!(&buffer[..status.len], pattern(i % 50, i), "message {i}");
            }
        }
        wait_all(sends)
    })?;
    // Too long for the buffer: kept.
    comm.send(right, 20, &pattern(100, 1))?;
    let err = comm.recv(left, 20, &mut [0; 99]).unwrap_err();
    ensure!(matches!(err, Error::Truncated { len: 100, capacity: 99, tag: 20, .. }), "{err:?}");
    let mut buffer = [0; 100];
    comm.recv(left, 20, &mut buffer)?;
    ensure!(buffer[..] == pattern(100, 1), "the kept message differs");
    // From anyone.
    if rank == 0 {
        let mut seen = vec![false; world];
        seen[0] = true;
        for _ in 1..world {
            let mut from = [0; 1];
            let status = comm.recv(Source::Any, 30, &mut from)?;
            ensure!(from[0] as usize == status.source && !seen[status.source], "{status:?} says {from:?}");
            seen[status.source] = true;
        }
    } else {
        comm.send(0, 30, &[rank as u8])?;
    }
    ensure!(matches!(comm.send(world, 1, &[]), Err(Error::InvalidRank { .. })), "rank {world} does not exist");
    comm.barrier()?;
    Ok(())
}

pub(crate) fn split(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let color = (rank % 3 != 2).then_some((rank % 2) as u32);
    let members: Vec<usize> = (0..world).rev().filter(|r| r % 3 != 2 && r % 2 == rank % 2).collect();
    match comm.split(color, -(rank as i32))? {
        None => ensure!(color.is_none(), "a rank with a colour got none"),
        Some(part) => {
            ensure!(
                part.world_size() == members.len() && members[part.rank()] == rank,
                "rank {} of {members:?}",
                part.rank()
            );
            part.barrier()?;
            let mut text = [0; 8];
            let (right, left) = ((part.rank() + 1) % members.len(), (part.rank() + members.len() - 1) % members.len());
            part.send(right, 5, &(rank as u64).to_le_bytes())?;
            // The parent's messages with the same tag never meet the part's.
            comm.send(rank, 5, b"parent")?;
            part.recv(left, 5, &mut text)?;
            ensure!(u64::from_le_bytes(text) as usize == members[left], "{text:?}");
            comm.recv(rank, 5, &mut text)?;
        }
    }
    let twin = comm.duplicate()?;
    twin.barrier()?;
    // In any order.
    if rank.is_multiple_of(2) {
        twin.destroy()
    } else {
        drop(twin)
    };
    comm.barrier()?;
    Ok(())
}

/// Kinds of messages that travel in different ways keep one order, and are found by tag in any order.
pub(crate) fn mixed_sizes(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    let len = |i: usize| [0, 40, 41, 5000, 32767, 40_000, 200_000, 1 << 20][i % 8] + i / 8;
    let texts: Vec<Vec<u8>> = (0..64).map(|i| pattern(len(i), i + rank)).collect();
    // 64 outstanding at once, both directions, the last tag asked for first.
    comm.scope(|s| {
        let sends =
            texts.iter().enumerate().map(|(i, t)| s.isend(right, i as u32 % 4, t)).collect::<xccl::Result<Vec<_>>>()?;
        let mut buffer = vec![0; 2 << 20];
        for tag in (0..4).rev() {
            for i in (0..64).filter(|i| i % 4 == tag) {
                let status = comm.recv(left, tag as u32, &mut buffer)?;
                assert_eq!((status.source, status.len), (left, len(i)), "message {i}");
                assert!(buffer[..status.len] == pattern(len(i), i + left), "message {i} differs");
            }
        }
        wait_all(sends)
    })?;
    // To itself, and from anyone: its own among them.
    comm.send(rank, 50, &pattern(100_000, rank))?;
    let mut own = vec![0; 100_000];
    let status = comm.recv(Source::Any, 50, &mut own)?;
    ensure!(status.source == rank && own == pattern(100_000, rank), "{status:?}");
    comm.barrier()?;
    Ok(())
}

/// From the symmetric heap, 100 large messages are outstanding and taken in another order: more than a pair of ranks can describe at once.
pub(crate) fn from_the_heap(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    let len = 50_000;
    let mut blocks = (0..100).map(|_| comm.heap_alloc(len)).collect::<xccl::Result<Vec<_>>>()?;
    blocks.iter_mut().enumerate().for_each(|(i, block)| block.copy_from_slice(&pattern(len, i + rank)));
    comm.scope(|s| {
        let sends =
            blocks.iter().enumerate().map(|(i, b)| s.isend(right, (i % 2) as u32, b)).collect::<xccl::Result<Vec<_>>>();
        let mut buffer = vec![0; len];
        for i in (1..100).step_by(2).chain((0..100).step_by(2)) {
            comm.recv(left, (i % 2) as u32, &mut buffer)?;
            assert!(buffer == pattern(len, i + left), "message {i} differs");
        }
        wait_all(sends?)
    })?;
    if world > 1 && comm.node_of(right)? == comm.node_of(rank)? {
        ensure!(comm.statistics().rendezvous >= 64, "{:?}", comm.statistics());
    }
    comm.barrier()?;
    Ok(())
}

/// A message that is too long for one receive goes to the next that has room, also when more messages stand behind it.
pub(crate) fn truncated(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    for long in [100, 50_000, 300_000] {
        let (first, second) = (pattern(long, 1), pattern(10, 2));
        let (mut small, mut large, mut last) = (vec![0; 10], vec![0; long], vec![0; long]);
        comm.scope(|s| {
            let sends = [s.isend(right, 7, &first)?, s.isend(right, 7, &second)?];
            // Both have come, or are on their way, before any receive is posted.
            comm.barrier()?;
            let too_small = s.irecv(left, 7, &mut small)?;
            let fits = s.irecv(left, 7, &mut large)?;
            let after = s.irecv(left, 7, &mut last)?;
            match too_small.wait() {
                Err(Error::Truncated { from, tag: 7, len, capacity: 10 }) => assert_eq!((from, len), (left, long)),
                other => panic!("a message of {long} bytes and a buffer of 10: {other:?}"),
            }
            assert_eq!(fits.wait()?.len, long);
            assert_eq!(after.wait()?.len, 10);
            wait_all(sends)
        })?;
        ensure!(large == first && last[..10] == second, "messages after a truncated one differ");
    }
    comm.barrier()?;
    Ok(())
}

/// A receive that is given up before it was done takes no message, whatever it has been given of one already.
pub(crate) fn given_up(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    let mut halves = 0;
    for (len, looks) in [10, 5_000, 300_000].into_iter().flat_map(|len| (0..6).map(move |looks| (len, looks))) {
        let texts = |rank: usize| [pattern(len, rank), pattern(len + 1, rank + 1)];
        let (own, mut first, mut buffer) = (texts(rank), vec![0; len], vec![0; len + 1]);
        comm.scope(|s| {
            let sends = [s.isend(right, 8, &own[0])?, s.isend(right, 8, &own[1])?];
            // What fits the ring is there; the rest comes only when its sender looks at its own requests.
            comm.barrier()?;
            let is_done = comm.scope(|inner| {
                let mut request = inner.irecv(left, 8, &mut first)?;
                for _ in 0..looks {
                    if request.test()?.is_some() {
                        return Ok(true);
                    }
                }
                Ok(false)
            })?;
            if is_done {
                assert!(first == texts(left)[0], "the first {len} bytes differ");
            } else {
                halves += usize::from(first.iter().any(|&b| b != 0));
            }
            for expected in &texts(left)[usize::from(is_done)..] {
                let status = comm.recv(left, 8, &mut buffer)?;
                assert!(buffer[..status.len] == expected[..], "{} bytes differ after {looks} looks", status.len);
            }
            wait_all(sends)
        })?;
        comm.barrier()?;
    }
    // A message to itself comes at once; one that is longer than the ring is seen half received, unless a thread moves it on.
    let is_near = comm.node_of(left)? == comm.node_of(rank)?;
    ensure!(world == 1 || halves > 0 || comm.cma_readable_by(left)? || !is_near, "no receive was given up half way");
    Ok(())
}

/// Receives with many tags, and from anyone, are each given the message they were posted for, in the order of posting.
pub(crate) fn many_posted(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    const N: usize = 500;
    let text = |rank: usize, i: usize| pattern(i % 90, rank * 1000 + i);
    let tag = |i: usize| (i % 7 * 1_000_000) as u32;
    let texts: Vec<_> = (0..N).map(|i| text(rank, i)).collect();
    let mut buffers = vec![[0u8; 90]; N];
    comm.scope(|s| {
        // By turns from the left and from anyone: only the left one sends these tags, so that the order of posting decides.
        let receives = buffers
            .iter_mut()
            .enumerate()
            .map(|(i, b)| s.irecv(if i % 3 == 0 { Source::Any } else { Source::Rank(left) }, tag(i), b))
            .collect::<xccl::Result<Vec<_>>>()?;
        let sends =
            texts.iter().enumerate().map(|(i, t)| s.isend(right, tag(i), t)).collect::<xccl::Result<Vec<_>>>()?;
        for (i, receive) in receives.into_iter().enumerate().rev() {
            let status = receive.wait()?;
            assert_eq!((status.source, status.tag, status.len), (left, tag(i), i % 90));
        }
        wait_all(sends)
    })?;
    for (i, buffer) in buffers.iter().enumerate() {
        ensure!(buffer[..i % 90] == text(left, i), "message {i} differs");
    }
    comm.barrier()?;
    Ok(())
}

/// Rank 0 loses patience with its sends, and uses their bytes for something else: rank 1 gets each message as it was, or is told
/// that it was given up where it was to copy it itself, or does not hear of it. A later message arrives.
pub(crate) fn given_up_by_the_sender(comm: &Communicator) -> Result<()> {
    for (round, len) in [(0, 100_000), (1, 400_000), (2, 3_000_000)] {
        let first = pattern(len, round);
        while matches!(comm.barrier(), Err(Error::Timeout { .. })) {}
        if comm.rank() == 0 {
            let mut private = first.clone();
            let mut heap = comm.heap_alloc(len)?;
            heap.copy_from_slice(&first);
            let before = comm.statistics().rendezvous;
            let outcomes = [comm.send(1, 1, &private), comm.send(1, 2, &heap)];
            private.fill(0xee);
            heap.fill(0xee);
            for outcome in outcomes {
                ensure!(matches!(outcome, Ok(()) | Err(Error::Timeout { peer: Some(1), .. })), "{outcome:?}");
            }
            comm.send(1, 3, &(comm.statistics().rendezvous - before).to_le_bytes())?;
            // Rank 1 receives while these bytes are what they are now.
            loop {
                match comm.recv(1, 4, &mut []) {
                    Err(Error::Timeout { .. }) => {}
                    other => break other.map(|_| ())?,
                }
            }
        } else {
            // Longer than both sends wait.
            std::thread::sleep(std::time::Duration::from_millis(1000));
            let mut withdrawn = 0u64;
            for tag in [1, 2] {
                let mut buffer = vec![0; len];
                match comm.recv(0, tag, &mut buffer) {
                    Ok(status) => {
                        ensure!(status.len == len && buffer == first, "message {tag} of {len} bytes was changed")
                    }
                    Err(Error::Withdrawn { rank: 0, tag: t }) if t == tag => withdrawn += 1,
                    Err(Error::Timeout { peer: Some(0), .. }) => {}
                    other => anyhow::bail!("{other:?}"),
                }
            }
            let mut described = [0; 8];
            comm.recv(0, 3, &mut described)?;
            ensure!(withdrawn == u64::from_le_bytes(described), "{withdrawn} of {described:?} were withdrawn");
            comm.send(0, 4, &[])?;
        }
    }
    Ok(())
}
