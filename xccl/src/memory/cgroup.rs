//! The limits of this process's control group, version 1 or 2: the tightest on the way from it to the root.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the kernel tells of control groups.
pub(crate) struct Groups<'a> {
    /// What `/proc/self/cgroup` says.
    pub(crate) listing: &'a str,
    /// `/sys/fs/cgroup`.
    pub(crate) root: &'a Path,
}

/// A share of the cores' time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Quota {
    /// Cores' worth of time that the group may use, all its processes together.
    pub(crate) cores: f64,
    /// The group's directory: processes with the same one share the quota.
    pub(crate) group: PathBuf,
}

impl Groups<'_> {
    /// Bytes that the group may still allocate. File pages that nobody has used for a while are given back on demand.
    pub(crate) fn available_memory(&self) -> Option<u64> {
        let v2 = |dir: &Path| Some((number(dir, "memory.max")?, number(dir, "memory.current")?));
        let v1 = |dir: &Path| Some((number(dir, "memory.limit_in_bytes")?, number(dir, "memory.usage_in_bytes")?));
        let left = self.directories("memory").filter_map(|dir| {
            let (limit, used) = v2(&dir).or_else(|| v1(&dir))?;
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let field = |name: &str| stat.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
            let idle = field("total_inactive_file ").or_else(|| field("inactive_file ")).unwrap_or(0);
            Some(limit.saturating_sub(used.saturating_sub(idle)))
        });
        left.min()
    }

    /// The group's share of the cores; `None` without a limit.
    pub(crate) fn quota(&self) -> Option<Quota> {
        let v2 = |dir: &Path| {
            let text = fs::read_to_string(dir.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            Some((quota.parse().ok()?, period.parse().ok()?))
        };
        let v1 = |dir: &Path| Some((number(dir, "cpu.cfs_quota_us")?, number(dir, "cpu.cfs_period_us")?));
        let quotas = self.directories("cpu").filter_map(|dir| {
            let (quota, period): (u64, u64) = v2(&dir).or_else(|| v1(&dir))?;
            (period > 0).then(|| Quota { cores: quota as f64 / period as f64, group: dir })
        });
        quotas.min_by(|a, b| a.cores.total_cmp(&b.cores))
    }

    /// The directories of the groups that limit `controller`, from the process's own to the root. Some may not be there: in a
    /// container the listing can name a path of the host, while its own group is mounted as the root.
    fn directories(&self, controller: &str) -> impl Iterator<Item = PathBuf> {
        let groups = self.listing.lines().filter_map(|line| {
            // Number, controllers (none in version 2), path.
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            match controllers {
                "" => Some(vec![(self.root.to_owned(), path)]),
                some if some.split(',').any(|c| c == controller) => {
                    Some([some, controller].map(|name| (self.root.join(name), path)).to_vec())
                }
                _ => None,
            }
        });
        let up = |(mount, path): (PathBuf, &str)| {
            let own = mount.join(path);
            let up: Vec<_> = own.ancestors().take_while(|dir| dir.starts_with(&mount)).map(Path::to_owned).collect();
            up
        };
        groups.flatten().flat_map(up).collect::<Vec<_>>().into_iter()
    }
}

/// A file's number; `None` for "max", for -1, and where it is not there.
fn number(dir: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of control groups, removed in the end.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Tree {
            let root = std::env::temp_dir().join(format!("xccl-cgroup-{}-{name}", std::process::id()));
            for (file, text) in files {
                let file = root.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            Tree(root)
        }

        fn groups<'a>(&'a self, listing: &'a str) -> Groups<'a> {
            Groups { listing, root: &self.0 }
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn version_2_gives_the_tightest_limit_up_to_the_root() {
        let files = [
            ("job/rank/cpu.max", "max 100000\n"),
            ("job/cpu.max", "150000 100000\n"),
            ("cpu.max", "800000 100000\n"),
            ("job/rank/memory.max", "max\n"),
            ("job/rank/memory.current", "5000\n"),
            ("job/memory.max", "9000\n"),
            ("job/memory.current", "6000\n"),
            ("job/memory.stat", "anon 1000\ninactive_file 2000\n"),
        ];
        let tree = Tree::new("v2", &files);
        let groups = tree.groups("0::/job/rank\n");
        assert_eq!(groups.quota(), Some(Quota { cores: 1.5, group: tree.0.join("job") }));
        assert_eq!(groups.available_memory(), Some(5000));
    }

    #[test]
    fn version_1_is_read_under_each_controllers_mount() {
        let files = [
            ("cpu,cpuacct/job/cpu.cfs_quota_us", "50000\n"),
            ("cpu,cpuacct/job/cpu.cfs_period_us", "100000\n"),
            ("cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("memory/job/memory.limit_in_bytes", "10000\n"),
            ("memory/job/memory.usage_in_bytes", "4000\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/memory.usage_in_bytes", "4000\n"),
        ];
        let tree = Tree::new("v1", &files);
        let groups = tree.groups("5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/other\n0::/\n");
        let quota = groups.quota().unwrap();
        assert_eq!((quota.cores, quota.group), (0.5, tree.0.join("cpu,cpuacct/job")));
        assert_eq!(groups.available_memory(), Some(6000));
    }

    #[test]
    fn in_a_container_the_mounts_root_is_the_own_group() {
        let files = [
            ("cpu/cpu.cfs_quota_us", "200000\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
            ("memory/memory.limit_in_bytes", "700\n"),
            ("memory/memory.usage_in_bytes", "900\n"),
        ];
        let tree = Tree::new("container", &files);
        let groups = tree.groups("5:cpu:/docker/3f1c\n4:memory:/docker/3f1c\n");
        assert_eq!(groups.quota().map(|q| q.cores), Some(2.0));
        assert_eq!(groups.available_memory(), Some(0));
    }

    #[test]
    fn without_limits_there_are_none() {
        let tree = Tree::new("none", &[("cpu.max", "max 100000\n"), ("memory.max", "max\n")]);
        for listing in ["0::/\n", "", "nonsense\n", "7:cpu:/gone\n"] {
            assert_eq!((tree.groups(listing).quota(), tree.groups(listing).available_memory()), (None, None));
        }
    }
}
