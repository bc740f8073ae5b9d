//! Which processes `up` starts and which cores each one gets. Pure: cores come in, a plan goes out.
//!
//! The policy, in one sentence: every node gets an equal share of the cores, and what is left over goes to the
//! decode nodes first. Decode runs all the time and every user feels its pace, while prefill works in bursts; on a
//! two-core machine both get one. The router is not pinned: it needs little, and the scheduler finds it a gap.
//! Read [`Plan`].

use crate::cli::CoreList;
use ridge_protocol::Role;

/// One process to start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// What it does.
    pub role: Role,
    /// Its name, such as `decode-0`.
    pub name: String,
    /// Compute threads; 0 for the router.
    pub threads: usize,
    /// Its own cores, or `None` if there are not enough for everybody.
    pub cores: Option<CoreList>,
}

/// All processes, the router first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What to start, in this order.
    pub members: Vec<Member>,
    /// Something the user should know about the sharing.
    pub remark: Option<String>,
}

impl Plan {
    /// Shares `cores`, neighbours first, among `prefill` and `decode` nodes. `threads` overrides each node's share.
    pub fn new(prefill: usize, decode: usize, threads: Option<usize>, cores: &[usize]) -> Self {
        assert!(decode > 0, "at least one decode node");
        let nodes = prefill + decode;
        let shares: Vec<usize> = match threads {
            Some(threads) => vec![threads; nodes],
            // In the order of serving: decode nodes first.
            None => (0..nodes).map(|i| (cores.len() / nodes + usize::from(i < cores.len() % nodes)).max(1)).collect(),
        };
        let wanted: usize = shares.iter().sum();
        let pinned = wanted <= cores.len();
        let remark = (!pinned).then(|| {
            format!(
                "{nodes} nodes want {wanted} threads but there are {} cores: threads are not pinned and will share",
                cores.len()
            )
        });
        let mut rest = cores;
        let mut serve = |role: Role, index: usize, threads: usize| {
            let mine = rest.split_off(..threads.min(rest.len())).unwrap_or(&[]);
            let mut mine = mine.to_vec();
            mine.sort_unstable();
            Member { role, name: format!("{role}-{index}"), threads, cores: pinned.then_some(CoreList(mine)) }
        };
        let decoders: Vec<Member> = (0..decode).map(|i| serve(Role::Decode, i, shares[i])).collect();
        let prefillers: Vec<Member> = (0..prefill).map(|i| serve(Role::Prefill, i, shares[decode + i])).collect();
        let router = Member { role: Role::Router, name: "router".into(), threads: 0, cores: None };
        let members = std::iter::once(router).chain(prefillers).chain(decoders).collect();
        Self { members, remark }
    }
}

/// The cores this process may use, hyper-threads of one core next to each other, so that a share cut from the list
/// has as few halves of a core as possible.
pub fn available_cores() -> Vec<usize> {
    let quota = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cores = match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(error) => {
            tracing::warn!(%error, "cannot read the set of usable cores");
            (0..quota).collect::<Vec<_>>()
        }
    };
    cores.sort_by_key(|cpu| (topology(*cpu, "physical_package_id"), topology(*cpu, "core_id"), *cpu));
    // A container may see more cores than its quota lets it use.
    cores.truncate(quota);
    cores
}

fn topology(cpu: usize, file: &str) -> i64 {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/{file}");
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(cpu as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prefill: usize, decode: usize, threads: Option<usize>, cores: usize, want: &[(&str, usize, &str)]) {
        let cores: Vec<usize> = (0..cores).collect();
        let plan = Plan::new(prefill, decode, threads, &cores);
        let seen: Vec<(String, usize, String)> = plan.members[1..]
            .iter()
            .map(|m| (m.name.clone(), m.threads, m.cores.as_ref().map_or("any".into(), CoreList::to_string)))
            .collect();
        let want: Vec<_> = want.iter().map(|(n, t, c)| ((*n).to_owned(), *t, (*c).to_owned())).collect();
        assert_eq!(seen, want);
        assert_eq!(plan.members[0].role, Role::Router);
        assert_eq!(plan.remark.is_some(), want.iter().any(|w| w.2 == "any"));
    }

    #[test]
    fn cores_are_disjoint_and_decode_comes_first() {
        check(1, 1, None, 2, &[("prefill-0", 1, "1"), ("decode-0", 1, "0")]);
        check(1, 1, None, 5, &[("prefill-0", 2, "3-4"), ("decode-0", 3, "0-2")]);
        check(1, 2, None, 8, &[("prefill-0", 2, "6-7"), ("decode-0", 3, "0-2"), ("decode-1", 3, "3-5")]);
        check(0, 1, None, 2, &[("decode-0", 2, "0-1")]);
        check(1, 1, Some(2), 8, &[("prefill-0", 2, "2-3"), ("decode-0", 2, "0-1")]);
    }

    #[test]
    fn too_few_cores_are_shared() {
        check(1, 1, None, 1, &[("prefill-0", 1, "any"), ("decode-0", 1, "any")]);
        check(1, 1, Some(4), 2, &[("prefill-0", 4, "any"), ("decode-0", 4, "any")]);
    }

    #[test]
    fn this_machine_has_cores() {
        assert!(!available_cores().is_empty());
    }
}
