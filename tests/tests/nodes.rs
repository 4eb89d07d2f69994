//! Ranks on several hosts, which are network namespaces, and on pretended nodes of this one, which always run.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use xccl_tests::namespaces::{Families, Namespaces};
use xccl_tests::{Ended, Job, free_port, new_job};

const RANK: &str = env!("CARGO_BIN_EXE_rank");
const PORT: &str = "29533";

fn all_well(what: &str, ended: Vec<Ended>) {
    assert!(ended.iter().all(|e| e.code == Some(0)), "{what}: {ended:#?}");
}

/// The environment of a rank of `hosts` with `each` ranks, as a launcher on its host gives it.
fn place(
    job: &str,
    (host, hosts): (usize, usize),
    (local, each): (usize, usize),
    master: &str,
) -> Vec<(String, String)> {
    let variables = [
        ("XCCL_RANK", (host * each + local).to_string()),
        ("XCCL_WORLD_SIZE", (hosts * each).to_string()),
        ("XCCL_LOCAL_RANK", local.to_string()),
        ("XCCL_LOCAL_WORLD_SIZE", each.to_string()),
        ("XCCL_JOB", job.to_owned()),
        ("XCCL_MASTER_ADDR", master.to_owned()),
        ("XCCL_MASTER_PORT", PORT.to_owned()),
    ];
    variables.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Some ranks of a job, each host's in its namespace.
struct Cluster<'a> {
    hosts: &'a Namespaces,
    number: usize,
    each: usize,
    id: String,
    job: Job,
}

impl<'a> Cluster<'a> {
    fn of(hosts: &'a Namespaces, number: usize, each: usize) -> Self {
        Cluster { hosts, number, each, id: new_job(), job: Job::default() }
    }

    fn start(&mut self, host: usize, local: usize, scenario: &str, more: &[(&str, &str)]) {
        let master = self.hosts.address(0).to_string();
        let mut env = place(&self.id, (host, self.number), (local, self.each), &master);
        env.extend(more.iter().map(|(name, value)| (name.to_string(), value.to_string())));
        self.job.start_command(self.hosts.command(host, RANK), scenario, env);
    }
}

fn meet_on_hosts(families: Families) {
    for number in [2, 4] {
        let Some(hosts) = Namespaces::new(number, families) else { return };
        for each in [1, 2, 4] {
            let mut cluster = Cluster::of(&hosts, number, each);
            // Rank 0 comes last.
            for host in (0..number).rev() {
                (0..each).rev().for_each(|local| cluster.start(host, local, "across-nodes", &[]));
            }
            all_well(&format!("{number} hosts of {each} ranks"), cluster.job.wait());
        }
    }
}

#[test]
fn ranks_on_several_hosts_meet() {
    meet_on_hosts(Families::Both);
}

#[test]
fn ranks_on_hosts_without_ipv4_meet() {
    meet_on_hosts(Families::V6);
}

/// What a rank said when it gave up, as it must have.
fn given_up(ended: &Ended) -> &str {
    assert!(ended.code.is_some_and(|code| code != 0), "{ended:?}");
    &ended.stderr
}

#[test]
fn a_host_that_is_cut_off_is_an_error_at_the_deadline_that_names_who_is_missing() {
    let Some(hosts) = Namespaces::new(2, Families::Both) else { return };
    hosts.link(1, false);
    let mut cluster = Cluster::of(&hosts, 2, 1);
    (0..2).for_each(|host| cluster.start(host, 0, "join", &[("XCCL_TIMEOUT", "2")]));
    let ended = cluster.job.wait();
    assert!(given_up(&ended[0]).contains("MissingRanks { ranks: [1]"), "{ended:#?}");
    let said = given_up(&ended[1]);
    assert!(said.contains("HostUnreachable") && said.contains(&format!("10.73.0.1:{PORT}")), "{ended:#?}");
}

#[test]
fn a_host_that_is_cut_off_while_the_ranks_join_is_an_error_at_the_deadline_everywhere() {
    let Some(hosts) = Namespaces::new(3, Families::Both) else { return };
    let mut cluster = Cluster::of(&hosts, 3, 1);
    let patience = [("XCCL_TIMEOUT", "3")];
    cluster.start(0, 0, "join", &patience);
    cluster.start(1, 0, "join", &patience);
    // They have met by now, or else rank 1 is missing: an error as well.
    std::thread::sleep(Duration::from_millis(500));
    hosts.link(1, false);
    cluster.start(2, 0, "join", &patience);
    for (rank, ended) in cluster.job.wait().iter().enumerate() {
        let said = given_up(ended);
        let expected = if rank == 1 { "rank 0" } else { "rank 1" };
        assert!(said.contains(expected) || said.contains("MissingRanks { ranks: [1]"), "rank {rank}: {said}");
    }
}

#[test]
fn a_host_that_vanishes_without_a_word_is_noticed_within_a_minute_at_both_ends() {
    let Some(hosts) = Namespaces::new(2, Families::Both) else { return };
    let mut cluster = Cluster::of(&hosts, 2, 1);
    let met = tempfile::tempdir().expect("a temporary folder");
    let folder = met.path().to_str().expect("its path is text");
    (0..2).for_each(|host| cluster.start(host, 0, "cut-off", &[("XCCL_TIMEOUT", "infinite"), ("TEST_MET", folder)]));
    let start = Instant::now();
    while (0..2).any(|rank| !met.path().join(rank.to_string()).exists()) {
        assert!(start.elapsed() < Duration::from_secs(20), "the ranks did not meet: {:#?}", cluster.job.wait());
        std::thread::sleep(Duration::from_millis(5));
    }
    hosts.link(1, false);
    all_well("2 hosts", cluster.job.wait());
}

#[test]
fn everything_is_as_on_one_node_between_hosts() {
    for families in [Families::Both, Families::V6] {
        let Some(hosts) = Namespaces::new(2, families) else { return };
        for scenario in ["moe", "wire", "messages", "split", "collectives"] {
            let mut cluster = Cluster::of(&hosts, 2, 2);
            (0..4).for_each(|rank| cluster.start(rank / 2, rank % 2, scenario, &[]));
            all_well(scenario, cluster.job.wait());
        }
    }
    let Some(hosts) = Namespaces::new(4, Families::Both) else { return };
    for (scenario, each) in [("moe", 2), ("messages", 1), ("collectives", 1)] {
        let mut cluster = Cluster::of(&hosts, 4, each);
        (0..4 * each).for_each(|rank| cluster.start(rank / each, rank % each, scenario, &[]));
        all_well(scenario, cluster.job.wait());
    }
}

#[test]
fn a_link_that_goes_down_amid_traffic_ends_in_an_error_or_the_right_result() {
    let Some(hosts) = Namespaces::new(2, Families::Both) else { return };
    // For good, and for less than the deadline.
    for back in [None, Some(Duration::from_millis(700))] {
        let mut cluster = Cluster::of(&hosts, 2, 2);
        let met = tempfile::tempdir().expect("a temporary folder");
        let folder = met.path().to_str().expect("its path is text");
        let env = [("XCCL_TIMEOUT", "4"), ("TEST_MET", folder)];
        (0..4).for_each(|rank| cluster.start(rank / 2, rank % 2, "under-a-cut", &env));
        let start = Instant::now();
        while (0..4).any(|rank| !met.path().join(rank.to_string()).exists()) {
            assert!(start.elapsed() < Duration::from_secs(20), "the ranks did not meet: {:#?}", cluster.job.wait());
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        hosts.link(1, false);
        if let Some(back) = back {
            std::thread::sleep(back);
            hosts.link(1, true);
        }
        all_well(&format!("down, up after {back:?}"), cluster.job.wait());
        hosts.link(1, true);
    }
}

#[test]
fn delay_and_loss_change_no_result() {
    let Some(hosts) = Namespaces::new(2, Families::Both) else { return };
    if let Err(why) = hosts.impair(1, "delay 2ms 1ms loss 1%") {
        eprintln!("skipped: no delay and loss here: {why}");
        return;
    }
    for scenario in ["in-flight", "mixed-sizes"] {
        let mut cluster = Cluster::of(&hosts, 2, 2);
        (0..4).for_each(|rank| cluster.start(rank / 2, rank % 2, scenario, &[]));
        all_well(scenario, cluster.job.wait());
    }
}

#[test]
fn a_job_text_that_differs_is_told_at_both_ends() {
    let Some(hosts) = Namespaces::new(2, Families::Both) else { return };
    let mut cluster = Cluster::of(&hosts, 2, 1);
    cluster.start(0, 0, "join", &[("XCCL_TIMEOUT", "2")]);
    cluster.start(1, 0, "join", &[("XCCL_TIMEOUT", "2"), ("XCCL_JOB", "another one")]);
    let ended = cluster.job.wait();
    let said = given_up(&ended[0]);
    assert!(said.contains("MissingRanks") && said.contains("from 10.73.0.2 (it belongs to another job"), "{said}");
    let said = given_up(&ended[1]);
    assert!(said.contains("HostUnreachable") && said.contains("waits for another job"), "{said}");
}

/// The environments of ranks on two pretended nodes, which meet at a port of the loopback interface.
fn pretended(ranks: usize, port: u16) -> Vec<Vec<(String, String)>> {
    let job = new_job();
    let rank = |rank: usize| {
        let mut env = place(&job, (0, 1), (rank, ranks), "::1");
        env.push(("XCCL_NODE_ID".into(), (rank % 2).to_string()));
        env.push(("XCCL_MASTER_PORT".into(), port.to_string()));
        env
    };
    (0..ranks).map(rank).collect()
}

#[test]
fn ranks_on_pretended_nodes_meet() {
    for ranks in [2, 3, 4] {
        all_well(
            &format!("{ranks} ranks"),
            Job::start_with(RANK, "across-nodes", pretended(ranks, free_port("::1"))).wait(),
        );
    }
}

#[test]
fn communicators_between_nodes_leave_nothing_open() {
    all_well("2 ranks", Job::start_with(RANK, "nothing-stays", pretended(2, free_port("::1"))).wait());
}

#[test]
fn a_port_in_use_is_told_with_what_to_choose() {
    let taken = TcpListener::bind("[::1]:0").expect("the loopback interface has IPv6");
    let mut ranks = pretended(2, taken.local_addr().expect("it is bound").port());
    ranks.iter_mut().for_each(|env| env.push(("XCCL_TIMEOUT".into(), "3".into())));
    let ended = Job::start_with(RANK, "join", ranks).wait();
    let said = given_up(&ended[0]);
    assert!(said.contains("CannotListen") && said.contains("choose another XCCL_MASTER_PORT"), "{said}");
    assert!(given_up(&ended[1]).contains("HostUnreachable"), "{ended:#?}");
}
