//! Collectives of ranks that are threads of this process, against a model in the plainest words.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::comm::far_tests::on_nodes;
use crate::{Config, Error, UniqueId};

/// Plays a rank on each of `n` threads, and gives what they returned.
fn play<R: Send>(n: usize, rank: impl Fn(&Communicator) -> R + Sync) -> Vec<R> {
    play_with(n, Config::default().heap_bytes(1 << 12).p2p_ring_bytes(4096), rank)
}

fn play_with<R: Send>(n: usize, config: Config, play: impl Fn(&Communicator) -> R + Sync) -> Vec<R> {
    let id = UniqueId::new().unwrap();
    std::thread::scope(|s| {
        let ranks: Vec<_> = (0..n)
            .map(|rank| {
                let (id, play, config) = (&id, &play, config.clone());
                s.spawn(move || play(&Communicator::init(rank, n, id, config).unwrap()))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// What the model needs to know of an element type.
trait Model: Value + PartialEq + std::fmt::Debug {
    /// Some value that is unlike its neighbours.
    fn some(seed: usize) -> Self;
    /// The elements of all ranks, joined in order.
    fn joined(all: &[Self], op: ReduceOp) -> Self;
    fn bits(self) -> u64;
}

fn joined_f32(all: impl Iterator<Item = f32> + Clone, op: ReduceOp) -> f32 {
    let sum = all.clone().reduce(|a, b| a + b).unwrap();
    match op {
        ReduceOp::Sum => sum,
        ReduceOp::Avg => sum / all.count() as f32,
        ReduceOp::Max => all.reduce(f32::max).unwrap(),
        ReduceOp::Min => all.reduce(f32::min).unwrap(),
    }
}

macro_rules! float_model {
    ($t:ty, $of:expr, $to:expr) => {
        impl Model for $t {
            fn some(seed: usize) -> Self {
                $of((seed % 1021) as f32 * 0.37 - 150.0)
            }
            fn joined(all: &[Self], op: ReduceOp) -> Self {
                $of(joined_f32(all.iter().map(|x| $to(*x)), op))
            }
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
    };
}

float_model!(f32, |x| x, |x| x);
float_model!(f16, f16::from_f32, f16::to_f32);
float_model!(bf16, bf16::from_f32, bf16::to_f32);

macro_rules! integer_model {
    ($t:ty) => {
        impl Model for $t {
            fn some(seed: usize) -> Self {
                seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) as $t
            }
            fn joined(all: &[Self], op: ReduceOp) -> Self {
                match op {
                    ReduceOp::Sum => all.iter().fold(0, |a, &b| a.wrapping_add(b)),
                    ReduceOp::Max => *all.iter().max().unwrap(),
                    ReduceOp::Min => *all.iter().min().unwrap(),
                    ReduceOp::Avg => (all.iter().map(|&x| x as i128).sum::<i128>() / all.len() as i128) as $t,
                }
            }
            fn bits(self) -> u64 {
                self as u64
            }
        }
    };
}

integer_model!(i32);
integer_model!(i64);
integer_model!(u8);

/// `count` elements that `rank` has for the `round`-th call.
fn elements<T: Model>(rank: usize, round: usize, count: usize) -> Vec<T> {
    (0..count).map(|i| T::some(i * 31 + rank * 7919 + round * 104_729 + 1)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Round {
    what: usize,
    op: ReduceOp,
    count: usize,
    root: usize,
    in_place: bool,
    later: bool,
}

/// What rank `rank` of `world` has in its buffer, by the model, and what it may not rely on (`None`).
fn expected<T: Model>(rank: usize, world: usize, n: usize, round: Round) -> Option<Vec<T>> {
    let Round { what, op, count, root, .. } = round;
    let all = |count| (0..world).map(|r| elements::<T>(r, n, count)).collect::<Vec<_>>();
    let reduced = |count| {
        let all: Vec<Vec<T>> = all(count);
        let column = |i: usize| all.iter().map(|v| v[i]).collect::<Vec<_>>();
        (0..count).map(|i| T::joined(&column(i), op)).collect::<Vec<_>>()
    };
    let block = |v: &[T], r: usize| v[r * count..(r + 1) * count].to_vec();
    match what {
        0 => Some(elements(root, n, count)),
        1 => (rank == root).then(|| all(count).concat()),
        2 => Some(all(count).concat()),
        3 => Some(block(&elements(root, n, count * world), rank)),
        4 => (rank == root).then(|| reduced(count)),
        5 => Some(block(&reduced(count * world), rank)),
        6 => Some(reduced(count)),
        _ => Some(all(count * world).iter().flat_map(|v| block(v, rank)).collect()),
    }
}

/// Makes one call, and gives what is in the buffer where the result belongs.
fn made<T: Model>(comm: &Communicator, n: usize, round: Round) -> Vec<T> {
    let Round { what, op, count, root, in_place, later } = round;
    let (rank, world) = (comm.rank(), comm.world_size());
    let mine = |count| elements::<T>(rank, n, count);
    let zeros = |count| vec![T::zeroed(); count];
    let one = count;
    let all = count * world;
    // A buffer of all blocks with the own one in place.
    let placed = || {
        let mut buffer = zeros(all);
        buffer[rank * one..(rank + 1) * one].copy_from_slice(&mine(one));
        buffer
    };
    let is_root = rank == root;
    let (send, mut recv) = match (what, in_place) {
        (0, true) => (None, if is_root { mine(one) } else { zeros(one) }),
        (0, false) => (Some(if is_root { mine(one) } else { vec![] }), zeros(one)),
        (1, true) => (None, if is_root { placed() } else { mine(one) }),
        (1, false) => (Some(mine(one)), zeros(if is_root { all } else { 0 })),
        (2, true) => (None, placed()),
        (2, false) => (Some(mine(one)), zeros(all)),
        (3, true) => (None, if is_root { mine(all) } else { zeros(one) }),
        (3, false) => (Some(if is_root { mine(all) } else { vec![] }), zeros(one)),
        (4 | 6, true) => (None, mine(one)),
        (4, false) => (Some(mine(one)), zeros(if is_root { one } else { 0 })),
        (5 | 7, true) => (None, mine(all)),
        (5, false) => (Some(mine(all)), zeros(one)),
        (6, false) => (Some(mine(one)), zeros(one)),
        _ => (Some(mine(all)), zeros(all)),
    };
    {
        let (send, recv) = (send.as_deref(), &mut recv[..]);
        let call = match what {
            0 => Collective::Broadcast { send, recv, root },
            1 => Collective::Gather { send, recv, root },
            2 => Collective::AllGather { send, recv },
            3 => Collective::Scatter { send, recv, root },
            4 => Collective::Reduce { send, recv, op, root },
            5 => Collective::ReduceScatter { send, recv, op },
            6 => Collective::AllReduce { send, recv, op },
            _ => Collective::AllToAll { send, recv },
        };
        match later {
            true => comm.scope(|scope| scope.start(call)?.wait()).unwrap(),
            false => comm.collective(call).unwrap(),
        }
    }
    // In place, the block is where it was.
    let has_all = (what == 3 && is_root || what == 5) && in_place;
    if has_all { recv[rank * one..(rank + 1) * one].to_vec() } else { recv }
}

fn check<T: Model>(world: usize, rounds: &[Round]) {
    check_on::<T>(&vec![0; world], rounds);
}

/// The same, with ranks on these nodes.
fn check_on<T: Model>(nodes: &[usize], rounds: &[Round]) {
    let world = nodes.len();
    let play_rank = |comm: &Communicator| {
        rounds.iter().enumerate().map(|(n, &round)| made::<T>(comm, n, round)).collect::<Vec<_>>()
    };
    let results = match nodes.iter().all(|&node| node == nodes[0]) {
        true => play(world, play_rank),
        false => on_nodes(nodes, 7, quick(), |comm| play_rank(&comm)),
    };
    for (rank, results) in results.into_iter().enumerate() {
        for (n, (result, &round)) in results.into_iter().zip(rounds).enumerate() {
            if let Some(expected) = expected::<T>(rank, world, n, round) {
                let bits = |v: &[T]| v.iter().map(|x| x.bits()).collect::<Vec<_>>();
                let differs = bits(&result).iter().zip(bits(&expected)).position(|(a, b)| *a != b);
                assert!(
                    result.len() == expected.len() && differs.is_none(),
                    "rank {rank} of {world}, call {n}, {round:?}, {}: {} elements, the first that differs at {differs:?}",
                    T::TYPE,
                    result.len()
                );
            }
        }
    }
}

fn quick() -> Config {
    Config::default().timeout(Some(std::time::Duration::from_secs(20))).heap_bytes(1 << 16)
}

fn check_type(dtype: DataType, world: usize, rounds: &[Round]) {
    match dtype {
        DataType::F32 => check::<f32>(world, rounds),
        DataType::F16 => check::<f16>(world, rounds),
        DataType::BF16 => check::<bf16>(world, rounds),
        DataType::I32 => check::<i32>(world, rounds),
        DataType::I64 => check::<i64>(world, rounds),
        DataType::U8 => check::<u8>(world, rounds),
    }
}

/// Counts around the limits of a slot's line, a slot, one-shot and a large slot.
fn counts() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 0usize..20,
        3 => 20usize..3000,
        2 => 3000usize..70_000,
        1 => 200_000usize..300_000,
    ]
}

fn rounds(world: usize) -> impl Strategy<Value = Vec<Round>> {
    let round = (0usize..8, 0usize..4, counts(), 0..world, any::<bool>(), any::<bool>()).prop_map(
        |(what, op, count, root, in_place, later)| Round { what, op: ReduceOp::ALL[op], count, root, in_place, later },
    );
    prop::collection::vec(round, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_rank_gets_what_the_model_says_bit_for_bit(
        (world, rounds) in (1usize..6).prop_flat_map(|world| (Just(world), rounds(world))),
        dtype in 0usize..6,
    ) {
        check_type(DataType::ALL[dtype], world, &rounds);
    }
}

#[test]
fn every_collective_of_every_type_works_with_one_to_nine_ranks() {
    for world in [1, 2, 3, 9] {
        for (i, dtype) in DataType::ALL.into_iter().enumerate() {
            let rounds: Vec<Round> = (0..64)
                .map(|n| Round {
                    what: n % 8,
                    op: ReduceOp::ALL[(n / 8 + i) % 4],
                    count: [1, 7, 100, 20_000][n / 8 % 4],
                    root: n % world,
                    in_place: n / 32 == 1,
                    later: n % 3 == 0,
                })
                .collect();
            check_type(dtype, world, &rounds);
        }
    }
}

/// The model knows nothing of nodes: results have the same bits as on one.
#[test]
fn ranks_on_several_nodes_get_what_the_model_says_bit_for_bit() {
    for nodes in [&[0, 1][..], &[0, 0, 1, 1], &[0, 1, 1, 1], &[1, 0, 2, 0, 1]] {
        let rounds: Vec<Round> = (0..64)
            .map(|n| Round {
                what: n % 8,
                op: ReduceOp::ALL[n / 8 % 4],
                count: [1, 7, 300, 5000][n / 8 % 4],
                root: n % nodes.len(),
                in_place: n / 32 == 1,
                later: n % 3 == 0,
            })
            .collect();
        check_on::<f32>(nodes, &rounds);
        check_on::<bf16>(nodes, &rounds[24..48]);
        check_on::<i64>(nodes, &rounds[8..40]);
    }
}

/// What is sent beside it is so short that it travels in records, which are not counted here.
#[test]
fn what_all_ranks_need_as_it_is_crosses_once_per_node() {
    const BYTES: usize = 40_000;
    on_nodes(&[0, 0, 1, 1], 12, quick(), |comm| {
        let crossed = |call: &dyn Fn()| {
            let before = comm.statistics().far_bytes;
            call();
            // Who is through the second has told all that the first has come, and what was sent before it.
            (0..2).for_each(|_| comm.barrier().unwrap());
            (comm.statistics().far_bytes - before) as usize
        };
        let gathered = crossed(&|| comm.all_gather(&[1u8; BYTES], &mut [0; 4 * BYTES]).unwrap());
        assert_eq!(gathered, BYTES);
        // Its quarters of what the two ranks there join, and once what it has joined.
        let reduced = crossed(&|| comm.all_reduce(&[1u8; BYTES], &mut [0; BYTES], ReduceOp::Max).unwrap());
        assert!(reduced.abs_diff(BYTES / 4 * 3) < 64 * 4, "{reduced}");
    });
}

#[test]
fn parts_of_different_sizes_arrive_on_other_nodes_and_wrong_ones_are_an_error() {
    let nodes = [0, 1, 0];
    on_nodes(&nodes, 3, quick(), |comm| {
        let (me, world) = (comm.rank(), comm.world_size());
        let len = |from: usize, to: usize| (from * 5 + to * 3) % 4 * 700;
        let parts = |len: &dyn Fn(usize) -> usize| {
            (0..world).scan(0, |end, r| Some(std::mem::replace(end, *end + len(r))..*end)).collect::<Vec<_>>()
        };
        let (sends, recvs) = (parts(&|to| len(me, to)), parts(&|from| len(from, me)));
        let send: Vec<i32> = (0..world).flat_map(|to| vec![(me * 10 + to) as i32; len(me, to)]).collect();
        let mut recv = vec![-1; recvs[world - 1].end];
        comm.all_to_all_v(&send, &sends, &mut recv, &recvs).unwrap();
        assert!((0..world).all(|from| recv[recvs[from].clone()].iter().all(|&x| x == (from * 10 + me) as i32)));
        comm.barrier().unwrap();
        // Rank 1 sends rank 0 one more than that expects.
        let lens = |r: usize| if me == 1 && r == 0 { 5 } else { 4 };
        let (sends, recvs) = (parts(&lens), parts(&|_| 4));
        let made = comm.all_to_all_v(&[1; 13], &sends, &mut [0; 12], &recvs);
        if me == 0 {
            let text = made.unwrap_err().to_string();
            assert!(text.contains("sending 20 bytes to rank 0") && text.contains("expecting 16 bytes"), "{text}");
        }
    });
}

#[test]
fn different_calls_on_other_nodes_are_told_of() {
    let texts = on_nodes(&[0, 1], 5, quick(), |comm| {
        let count = 10 + comm.rank();
        let made = comm.all_reduce_in_place(&mut vec![1u8; count], ReduceOp::Sum);
        made.unwrap_err().to_string()
    });
    for text in texts {
        assert!(["all_reduce(sum, 10 u8)", "all_reduce(sum, 11 u8)"].iter().all(|call| text.contains(call)), "{text}");
    }
}

#[test]
fn messages_with_any_tag_stay_apart_from_collectives() {
    on_nodes(&[0, 1], 9, quick(), |comm| {
        let other = 1 - comm.rank();
        for tag in [0, 1, u32::MAX] {
            comm.scope(|scope| {
                let sent = scope.isend(other, tag, b"mine")?;
                let mut sum = [comm.rank() as i32; 100];
                comm.all_reduce_in_place(&mut sum, ReduceOp::Sum)?;
                assert_eq!(sum, [1; 100]);
                let mut got = [0; 4];
                assert_eq!(comm.recv(crate::Source::Any, tag, &mut got)?.len, 4);
                assert_eq!(&got, b"mine");
                sent.wait().map(drop)
            })
            .unwrap();
        }
    });
}

/// From 8 MiB on results are written past the caches.
#[test]
fn results_that_go_past_the_caches_are_right_in_place_and_apart() {
    let round = |what, in_place| Round { what, op: ReduceOp::Sum, count: 1_500_001, root: 1, in_place, later: false };
    let rounds: Vec<Round> = (0..8).flat_map(|what| [round(what, false), round(what, true)]).collect();
    check::<i64>(2, &rounds);
}

/// Parts of rank r for rank s: some are empty, some long.
fn part_len(r: usize, s: usize, scale: usize) -> usize {
    [0, 1, 17, 3 * scale, scale / 7][(r * 3 + s * 5) % 5]
}

#[test]
fn parts_of_different_sizes_arrive_where_they_belong() {
    for world in [1, 2, 5] {
        for scale in [0, 10, 1000, 100_000] {
            play(world, |comm| {
                let me = comm.rank();
                let value = |from: usize, to: usize, i: usize| (from * 1_000_003 + to * 10_007 + i) as i32;
                // With gaps, and the receiver's in descending order.
                let (mut at, mut send) = (0, vec![]);
                let send_parts: Vec<_> = (0..world)
                    .map(|to| {
                        let len = part_len(me, to, scale);
                        send.extend((0..len).map(|i| value(me, to, i)));
                        send.push(-7);
                        at += len + 1;
                        at - len - 1..at - 1
                    })
                    .collect();
                let mut at = (0..world).map(|from| part_len(from, me, scale) + 1).sum::<usize>();
                let mut recv = vec![-1; at];
                let recv_parts: Vec<_> = (0..world)
                    .map(|from| {
                        let len = part_len(from, me, scale);
                        at -= len + 1;
                        at..at + len
                    })
                    .collect();
                for _ in 0..2 {
                    recv.fill(-1);
                    comm.all_to_all_v(&send, &send_parts, &mut recv, &recv_parts).unwrap();
                    for (from, part) in recv_parts.iter().enumerate() {
                        assert!(recv[part.clone()].iter().enumerate().all(|(i, &x)| x == value(from, me, i)));
                        assert_eq!(recv[part.end], -1);
                    }
                }
            });
        }
    }
}

#[test]
fn a_part_that_is_not_as_long_as_its_receiver_expects_is_an_error_everywhere() {
    play(3, |comm| {
        let mut lens = [4; 3];
        if comm.rank() == 1 {
            lens[2] = 5;
        }
        let parts: Vec<_> = lens.iter().map(|&len| 0..len).collect();
        let made = comm.all_to_all_v(&[1i32; 5], &parts, &mut [0; 12], &[0..4, 4..8, 8..12]);
        let text = made.and(comm.all_reduce_in_place(&mut [0u8], ReduceOp::Sum)).unwrap_err().to_string();
        let both =
            ["rank 1 calls all_to_all_v(sending 20 bytes to rank 2)", "all_to_all_v(expecting 16 bytes from rank 1)"];
        assert!(both.iter().all(|part| text.contains(part)), "{text}");
        let wrong = comm.all_to_all_v(&[1i32; 5], &[0..1, 1..2, 4..6], &mut [0; 3], &[0..1, 1..2, 2..3]).unwrap_err();
        assert!(wrong.to_string().contains("ranges inside 0..5"), "{wrong}");
    });
}

/// The root is a slot's number of broadcasts ahead at most, and nobody loses one.
#[test]
fn a_hundred_broadcasts_in_a_row_arrive_in_order() {
    play(3, |comm| {
        for n in 0..100usize {
            let mut buffer = vec![if comm.rank() == 1 { n as i64 } else { -1 }; n % 50 * 40 + 1];
            comm.broadcast(&mut buffer, 1).unwrap();
            assert!(buffer.iter().all(|&x| x == n as i64), "broadcast {n}");
        }
    });
}

#[test]
fn collectives_that_are_on_their_way_together_end_in_any_order_of_waiting() {
    play(3, |comm| {
        let mut sums = [[comm.rank() as i32; 5000]; 4];
        let mut blocks = vec![0u8; 3 * 100_000];
        let (mine, [a, b, c, d]) = (vec![comm.rank() as u8; 100_000], &mut sums);
        comm.scope(|scope| {
            let sum = |recv| Collective::AllReduce { send: None, recv, op: ReduceOp::Sum };
            let mut first = scope.start(sum(&mut a[..]))?;
            let mut second = scope.start(Collective::AllGather { send: Some(&mine), recv: &mut blocks })?;
            let _never_waited_for = scope.start(sum(&mut b[..]))?;
            let mut third = scope.start(sum(&mut c[..]))?;
            while !third.test()? {
                std::thread::yield_now();
            }
            second.wait()?;
            // A blocking call waits for its turn.
            comm.all_reduce_in_place(&mut d[..], ReduceOp::Sum)?;
            first.wait()
        })
        .unwrap();
        assert!(sums.iter().flatten().all(|&x| x == 3));
        assert!(blocks.chunks(100_000).enumerate().all(|(r, block)| block.iter().all(|&x| x == r as u8)));
    });
}

/// A rank that waits for a message moves its collective on, and one that waits for a collective its message.
#[test]
fn messages_and_collectives_move_each_other_on() {
    play(2, |comm| {
        let (long, mut got) = (vec![7u8; 1 << 20], vec![0u8; 1 << 20]);
        let mut sums = vec![1i64; 200_000];
        comm.scope(|scope| {
            if comm.rank() == 0 {
                let mut sum = scope.start(Collective::AllReduce { send: None, recv: &mut sums, op: ReduceOp::Sum })?;
                scope.irecv(1, 5, &mut got)?.wait()?;
                sum.wait()
            } else {
                let sent = scope.isend(0, 5, &long)?;
                comm.all_reduce_in_place(&mut sums, ReduceOp::Sum)?;
                sent.wait().map(drop)
            }
        })
        .unwrap();
        assert!(sums.iter().all(|&x| x == 2));
        assert!(comm.rank() == 1 || got == long);
    });
}

#[test]
fn ranks_that_make_different_calls_are_told_of_both() {
    type Wrong = fn(&Communicator) -> Result<()>;
    let cases: [(Wrong, Wrong, &str, &str); 6] = [
        (
            |c| c.all_reduce_in_place(&mut [0.0f32; 8], ReduceOp::Sum),
            |c| c.all_reduce_in_place(&mut [0.0f32; 9], ReduceOp::Sum),
            "all_reduce(sum, 8 f32)",
            "all_reduce(sum, 9 f32)",
        ),
        (
            |c| c.all_reduce_in_place(&mut [0i32; 50_000], ReduceOp::Sum),
            |c| c.all_reduce_in_place(&mut [0i32; 50_000], ReduceOp::Max),
            "all_reduce(sum, 50000 i32)",
            "all_reduce(max, 50000 i32)",
        ),
        (
            |c| c.all_gather(&[0u8; 8], &mut [0; 24]),
            |c| c.all_gather(&[0i64; 1], &mut [0; 3]),
            "all_gather(8 u8)",
            "all_gather(1 i64)",
        ),
        (
            |c| c.broadcast(&mut [0u8; 4], 0),
            |c| c.broadcast(&mut [0u8; 4], 1),
            "broadcast(4 u8, root 0)",
            "broadcast(4 u8, root 1)",
        ),
        (
            |c| c.broadcast(&mut [0u8; 4], 0),
            |c| c.reduce_in_place(&mut [0u8; 4], ReduceOp::Min, 0),
            "broadcast(4 u8, root 0)",
            "reduce(min, 4 u8, root 0)",
        ),
        // The one that differs reads from nobody, so that it is found in the next call.
        (
            |c| c.broadcast(&mut [0u8; 4], 0),
            |c| c.broadcast(&mut [0u8; 4], 2),
            "broadcast(4 u8, root 0)",
            "broadcast(4 u8, root 2)",
        ),
    ];
    for (right, wrong, first, second) in cases {
        play(3, |comm| {
            comm.all_reduce_in_place(&mut [1u8], ReduceOp::Sum).unwrap();
            let made = if comm.rank() == 2 { wrong(comm) } else { right(comm) };
            let after = comm.all_gather_in_place(&mut [0u8; 3]);
            let Err(Error::CallMismatch { epoch: 2, rank, theirs, other, others }) = made.and(after) else {
                panic!("rank {} was not told: {first}, {second}", comm.rank());
            };
            let (a, b) = if rank == 2 { (others, theirs) } else { (theirs, others) };
            assert!((rank == 2) != (other == 2), "{rank} {other}");
            assert_eq!((a.as_str(), b.as_str()), (first, second));
        });
    }
}

#[test]
fn wrong_arguments_are_refused_before_anything_is_published_and_the_call_may_be_repeated() {
    play(2, |comm| {
        let wrong = comm.broadcast(&mut [0u8; 4], 2).unwrap_err();
        assert!(matches!(wrong, Error::InvalidRank { rank: 2, world_size: 2 }), "{wrong}");
        let wrong = comm.all_gather(&[0u8; 4], &mut [0u8; 7]).unwrap_err();
        assert!(matches!(wrong, Error::Shape { what: "recv", given: 7, .. }), "{wrong}");
        let wrong = comm.reduce_scatter_in_place(&mut [0u8; 7], ReduceOp::Sum).unwrap_err();
        assert!(wrong.to_string().contains("a multiple of the 2 ranks"), "{wrong}");
        let wrong = comm.all_to_all(&[0u8; 8], &mut [0u8; 6]).unwrap_err();
        assert!(matches!(wrong, Error::Shape { what: "recv", given: 6, .. }), "{wrong}");
        comm.all_gather(&[0u8; 4], &mut [0u8; 8]).unwrap();
    });
}

#[test]
fn a_deadline_names_the_straggler_and_ends_the_others_too() {
    let config = Config::default().timeout(Some(std::time::Duration::from_millis(300)));
    let errors = play_with(3, config, |comm| {
        // Not all at once: the first one's deadline ends the second one's wait.
        std::thread::sleep(std::time::Duration::from_millis(100 * comm.rank() as u64));
        let made = (comm.rank() < 2).then(|| comm.all_reduce_in_place(&mut [1.0f32; 10], ReduceOp::Sum));
        if comm.rank() == 2 {
            std::thread::sleep(std::time::Duration::from_millis(600));
        }
        made.map(|made| (made.unwrap_err(), comm.all_reduce_in_place(&mut [1u8], ReduceOp::Sum).unwrap_err()))
    });
    let texts: Vec<String> = errors.into_iter().flatten().map(|(first, later)| format!("{first}\n{later}")).collect();
    assert!(texts[0].contains("all_reduce (epoch 1)") && texts[0].contains("rank 2"), "{}", texts[0]);
    assert!(texts[1].contains("rank 0 gave up all_reduce") || texts[1].contains("rank 2"), "{}", texts[1]);
}
