//! One rank of a test's job: plays the scenario that its argument names. Exit code 0 says that all was as expected.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use half::{bf16, f16};
use xccl::{Communicator, Config, Element, Error, Moe, MoeConfig, Reduction, Routing, Source, wait_all};

fn main() -> Result<()> {
    let scenario = std::env::args().nth(1).unwrap_or_default();
    let mut config = Config::from_env()?;
    if scenario == "late" && std::env::var("XCCL_RANK").as_deref() == Ok("1") {
        config = config.timeout(Some(Duration::from_secs(20)));
    }
    let comm = match Communicator::from_env_with(config) {
        Ok(comm) => comm,
        Err(err) => bail!("{err:?}: {err}"),
    };
    match scenario.as_str() {
        "join" => Ok(comm.barrier()?),
        "moe" => moe_in_every_form(&comm),
        "in-flight" => two_exchanges_in_flight(&comm),
        "refused" => bad_input_is_refused_and_may_be_corrected(&comm),
        "abandoned" => an_abandoned_batch_is_told(&comm),
        "p2p" => messages(&comm),
        "split" => split(&comm),
        "late" => a_late_rank_is_described(&comm),
        "isolation" => isolation(&comm),
        "idle" => idle(&comm),
        "die-in-barrier" | "die-in-recv" | "die-in-dispatch" | "die-in-combine" => die(&comm, &scenario),
        other => bail!("unknown scenario {other:?}"),
    }
}

/// A shape and what the ranks put in: the same wherever it is computed.
struct Case {
    config: MoeConfig,
    world: usize,
    seed: usize,
}

impl Case {
    fn tokens(&self, rank: usize) -> usize {
        (rank * 5 + self.seed * 3) % (self.config.max_tokens + 1)
    }

    fn value<E: Element>(&self, rank: usize, token: usize, column: usize) -> E {
        E::from_f32(((rank * 37 + token * 11 + column * 3 + self.seed) % 97) as f32 / 8.0 - 6.0)
    }

    /// Every fifth choice names no expert.
    fn id(&self, rank: usize, token: usize, k: usize) -> i64 {
        let first = rank * 7 + token * 13 + self.seed;
        if (first + k).is_multiple_of(5) { -1 } else { ((first + k * 3) % self.config.experts) as i64 }
    }

    fn weight(&self, rank: usize, token: usize, k: usize) -> f32 {
        ((rank + token + k) % 9) as f32 * 0.3 - 1.0
    }

    fn is_active(&self, token: usize) -> bool {
        token % 4 != 3
    }

    /// What expert `expert` makes of an element.
    fn expert<E: Element>(&self, expert: i64, x: E) -> E {
        E::from_f32(x.to_f32() * (expert % 7 + 1) as f32 + 0.125)
    }

    /// A token's sum, in the plainest way.
    fn sum<E: Element>(&self, rank: usize, token: usize, column: usize) -> E {
        let mut sum = 0.0f32;
        for k in 0..self.config.topk {
            let id = self.id(rank, token, k);
            if id >= 0 && self.is_active(token) {
                sum += self.weight(rank, token, k) * self.expert(id, self.value::<E>(rank, token, column)).to_f32();
            }
        }
        E::from_f32(sum)
    }

    fn input<E: Element>(&self, rank: usize) -> (Vec<E>, Vec<i64>, Vec<f32>, Vec<bool>) {
        let tokens = 0..self.tokens(rank);
        let choices = || tokens.clone().flat_map(|t| (0..self.config.topk).map(move |k| (t, k)));
        (
            tokens.clone().flat_map(|t| (0..self.config.hidden).map(move |c| self.value(rank, t, c))).collect(),
            choices().map(|(t, k)| self.id(rank, t, k)).collect(),
            choices().map(|(t, k)| self.weight(rank, t, k)).collect(),
            tokens.clone().map(|t| self.is_active(t)).collect(),
        )
    }

    /// (expert, source, token) of each row that `rank`'s experts should get, in the batch's order.
    fn rows(&self, experts: &[usize]) -> Vec<(usize, usize, usize)> {
        let mut rows = vec![];
        for &expert in experts {
            for source in 0..self.world {
                for token in (0..self.tokens(source)).filter(|&t| self.is_active(t)) {
                    if (0..self.config.topk).any(|k| self.id(source, token, k) == expert as i64) {
                        rows.push((expert, source, token));
                    }
                }
            }
        }
        rows
    }
}

/// How the experts' side takes the rows and hands its outputs in.
#[derive(Clone, Copy)]
enum Form {
    InPlace,
    ExpertMajor,
    Padded,
}

fn moe_in_every_form(comm: &Communicator) -> Result<()> {
    fn cases<E: Element>(comm: &Communicator) -> Result<()> {
        let shape = |hidden, placement| MoeConfig { placement, ..MoeConfig::new(9, hidden, 3, 11, E::DTYPE) };
        let uneven = (0..11).map(|e| (e * e) % comm.world_size()).collect();
        for (config, form) in [
            (shape(100, None), Form::InPlace),
            (shape(64, Some(uneven)), Form::ExpertMajor),
            (shape(333, None), Form::Padded),
        ] {
            let moe = Moe::new(comm, config.clone())?;
            for seed in 0..6 {
                let case = Case { config: config.clone(), world: comm.world_size(), seed };
                exchange::<E>(comm, &moe, &case, form)?;
            }
        }
        Ok(())
    }
    cases::<f32>(comm)?;
    cases::<bf16>(comm)?;
    cases::<f16>(comm)?;
    per_rank_is_close(comm)
}

fn exchange<E: Element>(comm: &Communicator, moe: &Moe, case: &Case, form: Form) -> Result<()> {
    let (rank, hidden) = (comm.rank(), case.config.hidden);
    let (tokens, ids, weights, active) = case.input::<E>(rank);
    // Both widths of ids, and both places for the tokens.
    let narrow: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let sent = if case.seed.is_multiple_of(2) {
        moe.dispatch_send(&tokens, &Routing::new(&ids, &weights).active(&active))?
    } else {
        let mut rows = moe.input_rows::<E>(case.tokens(rank))?;
        for t in 0..rows.len() {
            rows.row(t).copy_from_slice(&tokens[t * hidden..(t + 1) * hidden]);
        }
        moe.dispatch_send_rows(rows, &Routing::new(&narrow, &weights).active(&active))?
    };
    let mut batch = moe.dispatch_recv(&sent)?;
    let expected = case.rows(batch.local_experts());
    let found: Vec<_> = batch.rows().map(|r| (batch.local_experts()[r.expert], r.source, r.token)).collect();
    ensure!(found == expected, "rows are {found:?}, expected {expected:?}");
    let row_of = |source, token| (0..hidden).map(move |c| case.value::<E>(source, token, c)).collect::<Vec<E>>();
    let bytes = |row: &[E]| bytemuck::cast_slice::<E, u8>(row).to_vec();
    match form {
        Form::InPlace => {
            for (i, &(expert, source, token)) in expected.iter().enumerate() {
                // SAFETY: the senders keep the protocol: this program is all ranks.
                let row = unsafe { batch.row_slice::<E>(i)? }.to_vec();
                ensure!(bytes(&row) == bytes(&row_of(source, token)), "row {i} differs in place");
                let output = batch.output_row::<E>(i)?;
                output.iter_mut().zip(row).for_each(|(y, x)| *y = case.expert(expert as i64, x));
            }
            moe.combine_send(batch)?;
        }
        Form::ExpertMajor | Form::Padded => {
            let capacity = batch.counts().iter().copied().max().unwrap_or(0) as usize;
            let (align, padded) = (4, matches!(form, Form::Padded));
            let rows = if padded { batch.counts().len() * capacity } else { batch.aligned_rows(align) };
            let mut copied = vec![E::from_f32(-1.0); rows * hidden];
            if padded {
                batch.copy_padded(&mut copied, capacity)?;
                if capacity > 0 {
                    let too_small = batch.copy_padded(&mut copied, capacity - 1);
                    ensure!(matches!(too_small, Err(Error::CapacityExceeded { .. })), "{too_small:?}");
                }
            } else {
                batch.copy_into(&mut copied, align)?;
            }
            let (mut at, mut outputs) = (0, vec![]);
            for (e, &count) in batch.counts().iter().enumerate() {
                let begin = if padded { e * capacity } else { at };
                at += (count as usize).next_multiple_of(align);
                for i in 0..count as usize {
                    let (expert, source, token) = expected[batch.offsets()[e] as usize + i];
                    let row = &copied[(begin + i) * hidden..][..hidden];
                    ensure!(bytes(row) == bytes(&row_of(source, token)), "row {i} of expert {expert} differs");
                    outputs.extend(row.iter().map(|&x| case.expert(expert as i64, x)));
                }
            }
            moe.combine_send_from(batch, &outputs)?;
        }
    }
    let mut out = vec![E::from_f32(f32::NAN); tokens.len()];
    moe.combine_recv(sent, &mut out)?;
    for (i, y) in out.iter().enumerate() {
        let expected = case.sum::<E>(rank, i / hidden, i % hidden);
        ensure!(
            bytemuck::bytes_of(y) == bytemuck::bytes_of(&expected),
            "element {i}: {} instead of {}",
            y.to_f32(),
            expected.to_f32()
        );
    }
    Ok(())
}

fn per_rank_is_close(comm: &Communicator) -> Result<()> {
    let shape = MoeConfig::new(9, 100, 3, 11, xccl::DType::F32);
    let config = MoeConfig { reduction: Reduction::PerRank, ..shape };
    let moe = Moe::new(comm, config.clone())?;
    for seed in 0..4 {
        let case = Case { config: config.clone(), world: comm.world_size(), seed };
        let (tokens, ids, weights, active) = case.input::<f32>(comm.rank());
        let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights).active(&active))?;
        let mut batch = moe.dispatch_recv(&sent)?;
        let mut outputs = vec![];
        let mut row = vec![0.0f32; 100];
        for i in 0..batch.len() {
            batch.copy_row(i, &mut row)?;
            let expert = batch.local_experts()[batch.row(i).expert] as i64;
            let output: Vec<f32> = row.iter().map(|&x| case.expert(expert, x)).collect();
            batch.output_row::<f32>(i)?.copy_from_slice(&output);
            outputs.extend(output);
        }
        // The same sums, from the outbox and from a buffer.
        if seed % 2 == 0 {
            moe.combine_send(batch)?
        } else {
            moe.combine_send_from(batch, &outputs)?
        };
        let mut out = vec![f32::NAN; tokens.len()];
        moe.combine_recv(sent, &mut out)?;
        for (i, y) in out.iter().enumerate() {
            let expected = case.sum::<f32>(comm.rank(), i / 100, i % 100);
            ensure!((y - expected).abs() < 1e-3, "element {i}: {y} instead of {expected}");
        }
    }
    Ok(())
}

/// Sends 1, 2, then finishes 1, sends 3, and so on: always two in flight, the third refused.
fn two_exchanges_in_flight(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(4, 16, 1, comm.world_size() * 2, xccl::DType::F32);
    let moe = Moe::new(comm, config)?;
    let experts = comm.world_size() as i32 * 2;
    let send = |n: i32| {
        let tokens = vec![(n * 10 + comm.rank() as i32) as f32; 16 * 2];
        moe.dispatch_send(&tokens, &Routing::new(&[n % experts, (n + 3) % experts], &[1.0, 2.0]))
    };
    let finish = |n: i32, sent: xccl::Exchange<'_>| -> Result<()> {
        let mut batch = moe.dispatch_recv(&sent)?;
        let mut row = [0.0f32; 16];
        for i in 0..batch.len() {
            batch.copy_row(i, &mut row)?;
            let source = batch.row(i).source as i32;
            ensure!(row == [(n * 10 + source) as f32; 16], "exchange {n} holds {row:?} of rank {source}");
            batch.output_row::<f32>(i)?.copy_from_slice(&row);
        }
        moe.combine_send(batch)?;
        let mut out = [0.0f32; 32];
        moe.combine_recv(sent, &mut out)?;
        let value = (n * 10 + comm.rank() as i32) as f32;
        ensure!(out[0] == value && out[31] == 2.0 * value, "exchange {n} gave {out:?}");
        Ok(())
    };
    let mut previous = (0, send(0)?);
    for n in 1..60 {
        let next = (n, send(n)?);
        let third = send(n + 1).map(|_| ());
        ensure!(matches!(third, Err(Error::TooManyInFlight { limit: 2, .. })), "{third:?}");
        finish(previous.0, previous.1)?;
        previous = next;
    }
    finish(previous.0, previous.1)?;
    ensure!(comm.statistics().exchanges == 60, "{:?}", comm.statistics());
    Ok(())
}

fn bad_input_is_refused_and_may_be_corrected(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(2, 8, 2, 4, xccl::DType::F32))?;
    let row = [1.0f32; 8];
    let good = ([0i32, 3], [0.5f32, 0.5]);
    if comm.rank() == 1 {
        let refuse = |ids: &[i32], tokens: &[f32]| {
            let weights = vec![1.0; ids.len()];
            moe.dispatch_send(tokens, &Routing::new(ids, &weights)).map(|_| ()).unwrap_err()
        };
        let err = refuse(&[2, 2], &row);
        ensure!(matches!(err, Error::DuplicateExpert { token: 0, k: 1, expert: 2 }), "{err:?}");
        let err = refuse(&[0, 4], &row);
        ensure!(matches!(err, Error::ExpertOutOfRange { token: 0, k: 1, expert: 4, experts: 4 }), "{err:?}");
        let err = refuse(&[0, 1, 0, 1, 0, 1], &[0.0; 24]);
        ensure!(matches!(err, Error::TooManyTokens { given: 3, limit: 2 }), "{err:?}");
        let err = refuse(&[0, 1], &row[..7]);
        ensure!(matches!(err, Error::Shape { what: "tokens", given: 7, .. }), "{err:?}");
        let err = moe.dispatch_send(&[bf16::ONE; 8], &Routing::new(&good.0, &good.1)).map(|_| ()).unwrap_err();
        ensure!(matches!(err, Error::DTypeMismatch { .. }), "{err:?}");
        // The others are told, see below, before this rank corrects itself.
        comm.recv(0, 1, &mut [])?;
    }
    let sent = moe.dispatch_send(&row, &Routing::new(&good.0, &good.1));
    let sent = sent?;
    if comm.rank() == 0 {
        let start = Instant::now();
        let refused = moe.dispatch_recv(&sent).map(|_| ());
        ensure!(matches!(refused, Err(Error::PeerRefused { rank: 1, epoch: 1 })), "{refused:?}");
        ensure!(start.elapsed() < Duration::from_secs(10), "told only after {:?}", start.elapsed());
        comm.send(1, 1, &[])?;
    }
    let mut batch = loop {
        match moe.dispatch_recv(&sent) {
            Err(Error::PeerRefused { rank: 1, .. }) => std::thread::sleep(Duration::from_millis(1)),
            other => break other?,
        }
    };
    for i in 0..batch.len() {
        batch.output_row::<f32>(i)?.copy_from_slice(&row);
    }
    moe.combine_send(batch)?;
    let mut out = [0.0f32; 8];
    moe.combine_recv(sent, &mut out)?;
    ensure!(out == row, "{out:?}");
    Ok(())
}

fn an_abandoned_batch_is_told(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), xccl::DType::F32))?;
    let last = comm.world_size() - 1;
    for epoch in 1..=3u64 {
        let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]))?;
        let mut batch = moe.dispatch_recv(&sent)?;
        if comm.rank() == last && epoch == 2 {
            drop(batch);
        } else {
            for i in 0..batch.len() {
                batch.output_row::<f32>(i)?.fill(epoch as f32);
            }
            moe.combine_send(batch)?;
        }
        let outcome = moe.combine_recv(sent, &mut [0.0f32; 8]);
        match epoch {
            2 => {
                ensure!(matches!(outcome, Err(Error::PeerAbandoned { rank, epoch: 2 }) if rank == last), "{outcome:?}")
            }
            _ => outcome?,
        }
    }
    Ok(())
}

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + salt * 13 + (i >> 8)) as u8).collect()
}

fn messages(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (right, left) = ((rank + 1) % world, (rank + world - 1) % world);
    // Around every limit, both neighbours at once, private memory and heap.
    for len in [0, 1, 8, 40, 41, 63, 64, 4096, 32767, 32768, 65536, 131072, 131073, 1_000_000] {
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

fn split(comm: &Communicator) -> Result<()> {
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

fn a_late_rank_is_described(comm: &Communicator) -> Result<()> {
    if comm.rank() == 1 {
        // Nobody sends this: it waits until rank 0, which has less patience, leaves.
        let err = comm.recv(0, 77, &mut [0; 8]).unwrap_err();
        ensure!(matches!(err, Error::PeerLeft { rank: 0, .. }), "{err:?}");
        return Ok(());
    }
    let err = comm.barrier().unwrap_err();
    let Error::Timeout { peer: Some(1), .. } = err else { bail!("{err:?}") };
    let text = err.to_string();
    for part in ["barrier", "rank 1", "recv", "77"] {
        ensure!(text.contains(part), "{text:?} lacks {part:?}");
    }
    Ok(())
}

/// This rank's read-only mappings of other ranks' outboxes: address ranges.
fn read_only_mappings() -> Result<Vec<(usize, usize)>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let range = |line: &str| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
    };
    Ok(maps.lines().filter(|l| l.contains("memfd:xccl") && l.contains("r--s")).filter_map(range).collect())
}

fn isolation(comm: &Communicator) -> Result<()> {
    use std::os::fd::AsRawFd;
    let mappings = read_only_mappings()?;
    ensure!(mappings.len() >= comm.world_size(), "found only {mappings:?}");
    for (from, to) in mappings {
        // SAFETY: asks for a right; nothing is written even if it were given.
        let outcome = unsafe { libc::mprotect(from as *mut _, to - from, libc::PROT_READ | libc::PROT_WRITE) };
        ensure!(outcome == -1, "mprotect made a peer's outbox writable");
        let path = format!("/proc/self/map_files/{from:x}-{to:x}");
        let Ok(file) = std::fs::OpenOptions::new().read(true).write(true).open(&path) else { continue };
        let written = nix::unistd::write(&file, b"x");
        ensure!(written.is_err(), "write through {path} changed a peer's outbox");
        // SAFETY: a fresh mapping at an address of the kernel's choice; it is expected to be refused.
        let mapped =
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        ensure!(mapped == libc::MAP_FAILED, "a new mapping of {path} is writable");
    }
    comm.barrier()?;
    Ok(())
}

/// Rank 0 waits a second for a message: it must sleep, not spin.
fn idle(comm: &Communicator) -> Result<()> {
    if comm.rank() == 1 {
        std::thread::sleep(Duration::from_millis(1500));
        return Ok(comm.send(0, 1, &[1])?);
    }
    let cpu = || -> Result<f64> {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
    };
    let before = cpu()?;
    comm.recv(1, 1, &mut [0])?;
    let used = cpu()? - before;
    ensure!(used < 0.02 * 1.5, "used {used} s of a core in 1.5 s");
    Ok(())
}

/// The last rank kills itself at the point that the scenario names; the others expect to be told.
fn die(comm: &Communicator, scenario: &str) -> Result<()> {
    let last = comm.world_size() - 1;
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), xccl::DType::F32))?;
    comm.barrier()?;
    let kill = || nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    let dies = comm.rank() == last;
    let routing = ([last as i32], [1.0f32]);
    if dies && scenario != "die-in-combine" {
        // The others are asleep by then.
        std::thread::sleep(Duration::from_millis(300));
        kill()?;
    }
    let outcome = match scenario {
        "die-in-barrier" => comm.barrier(),
        "die-in-recv" => comm.recv(Source::Any, 1, &mut [0; 8]).map(|_| ()),
        _ => {
            let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&routing.0, &routing.1))?;
            let batch = moe.dispatch_recv(&sent);
            if dies {
                std::thread::sleep(Duration::from_millis(300));
                kill()?;
            }
            match batch {
                Err(err) => Err(err),
                Ok(batch) => moe.combine_send(batch).and_then(|()| moe.combine_recv(sent, &mut [0.0f32; 8])),
            }
        }
    };
    let Err(Error::PeerDied { rank, .. }) = outcome else { bail!("{outcome:?}") };
    ensure!(rank == last, "rank {rank} was blamed, rank {last} died");
    // Later calls say the same.
    let again = comm.barrier();
    ensure!(matches!(again, Err(Error::PeerDied { rank, .. }) if rank == last), "{again:?}");
    Ok(())
}
